"""Kullback-Leibler divergences in plain torch with the gradient written out, a few rows at a time: the CPU's kernels.

A chunk of rows is copied into float32 scratch that stays in the cache, so nothing of size [N, V] is made but the gradient.
With u = a/T - A, v = b/T - B, w = c/T - C, each centred on its own maximum over the shard (A, B, C):

    statistics   A, SA = sum e^u, D = sum e^u (u - v), B, SB = sum e^v   (third tensor: E = sum e^u (u - w), C, SC = sum e^w)
    merge        A* = max A, D* = sum e^(A - A*) (D + ((A - A*) - (B - B*)) SA);      KL(a || b) = D*/SA* - log SA* + log SB*
    gradient     da = g p_a (log p_a - log p_b - KL_ab + coef (log p_a - log p_c - KL_ac)) / T,      db = g (p_b - p_a) / T
                 where p_a = e^u / SA* and log p_a - log p_b - KL_ab = u - v - D*/SA*, centred on A* and B*

D is centred on both maxima, and maximum and sum are never added into one log-sum-exp: an offset between two models, or logits of
30,000, would cost the digits that matter. The same five (or eight) numbers merge over vocabulary splits and over tensor-parallel
ranks, in one all-gather.

N rows, V columns here, K statistics (5 or 8), P partial statistics, R rows of one chunk. `triton` has the same functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..row_chunks import accumulation_dtype, centred, clear_inactive, row_chunks, scaled, scratch, write_rows
from ..shards import FLOOR, VocabShard, merge_sums


class Merged(NamedTuple):
    """A row's statistics over the whole vocabulary, each [N]: maxima, sums of exponentials less the maximum, divergences."""

    top_a: Tensor
    sum_a: Tensor
    top_b: Tensor
    sum_b: Tensor
    kl_ab: Tensor
    top_c: Tensor | None = None
    sum_c: Tensor | None = None
    kl_ac: Tensor | None = None

    def row_constant(self, coef: float | Tensor) -> Tensor:
        """[N] nats: what the gradient subtracts from u - v + coef (u - w)."""
        log_a = self.sum_a.log()
        constant_N = self.kl_ab + (log_a - self.sum_b.log())
        return constant_N if self.kl_ac is None else constant_N + coef * (self.kl_ac + (log_a - self.sum_c.log()))


def statistics(a_NV: Tensor, b_NV: Tensor, c_NV: Tensor | None = None, *, weights: Tensor | None = None,
               temperature: float = 1.0, difference: bool = False) -> Tensor:
    """[1, K, N] statistics of this shard; rows of weight 0 are not read. `difference`: the third tensor holds a - c."""
    stats_KN = a_NV.new_zeros(5 if c_NV is None else 8, a_NV.shape[0], dtype=accumulation_dtype(a_NV))
    stats_KN[1::3] = 1.0  # SA, SB, SC of a row that is not read: its divergence is log 1
    u_, v_, e_, *third_ = scratch(a_NV, 3 if c_NV is None else 5)
    w_, d_ = third_ or (None, u_)  # u is needed again with a third tensor only
    for rows in row_chunks(a_NV, None if weights is None else weights != 0):
        u, A = centred(scaled(a_NV, rows, temperature, u_))
        v, B = centred(scaled(b_NV, rows, temperature, v_))
        e = torch.exp(u, out=e_[: len(u)])
        D = torch.sub(u, v, out=d_[: len(u)]).mul_(e).sum(-1)
        row_stats = [A, e.sum(-1), D, B, v.exp_().sum(-1)]
        if c_NV is not None:
            w, C = centred(_third(a_NV, c_NV, rows, temperature, difference, w_, d_))
            row_stats += [u.sub_(w).mul_(e).sum(-1), C, w.exp_().sum(-1)]
        stats_KN[:, rows] = torch.stack(row_stats)
    return stats_KN[None]


def merge(stats_PKN: Tensor) -> Merged:
    """The statistics of all parts of the vocabulary as one."""
    A, SA, D, B, SB, *third = stats_PKN.unbind(1)
    (top_a, sum_a), (top_b, sum_b) = merge_sums(A, SA), merge_sums(B, SB)
    scale_a = (A - top_a).exp()

    def divergence(D: Tensor, B: Tensor, top_b: Tensor, sum_b: Tensor) -> Tensor:
        return (scale_a * (D + ((A - top_a) - (B - top_b)) * SA)).sum(0) / sum_a - sum_a.log() + sum_b.log()

    merged = Merged(top_a, sum_a, top_b, sum_b, divergence(D, B, top_b, sum_b))
    if not third:
        return merged
    E, C, SC = third
    top_c, sum_c = merge_sums(C, SC)
    return merged._replace(top_c=top_c, sum_c=sum_c, kl_ac=divergence(E, C, top_c, sum_c))


def whole_rows(kernels: ModuleType, shard: VocabShard, logits_NV: Sequence[Tensor], **options) -> Merged:
    """The statistics of whole rows, by this module's functions or those of one like it: of this shard's columns, and one all-gather."""
    return kernels.merge(shard.all_gather(kernels.statistics(*logits_NV, **options)))


def gradient(a_NV: Tensor, b_NV: Tensor, c_NV: Tensor | None, merged: Merged, scale_N: Tensor, *, temperature: float = 1.0,
             coef: float | Tensor = 0.0, difference: bool = False, grad_a: Tensor | None = None,
             grad_b: Tensor | None = None) -> None:
    """Write the gradients times scale_N (upstream, weight and 1/T) into grad_a and grad_b, which may be a and b themselves."""
    active_N = scale_N != 0
    constant_N, scale_a, scale_b = merged.row_constant(coef), scale_N / merged.sum_a, scale_N / merged.sum_b
    u_, v_, p_, *third_ = scratch(a_NV, 3 if c_NV is None else 5)
    w_, d_ = third_ or (None, u_)
    for rows in row_chunks(a_NV, active_N):
        u = scaled(a_NV, rows, temperature, u_).sub_(merged.top_a[rows, None]).clamp_min_(FLOOR)
        v = scaled(b_NV, rows, temperature, v_).sub_(merged.top_b[rows, None]).clamp_min_(FLOOR)
        scaled_p_a = torch.exp(u, out=p_[: len(u)]).mul_(scale_a[rows, None])
        if grad_a is not None:
            if c_NV is not None:
                w = _third(a_NV, c_NV, rows, temperature, difference, w_, d_).sub_(merged.top_c[rows, None]).clamp_min_(FLOOR)
            ratio = torch.sub(u, v, out=d_[: len(u)])
            if c_NV is not None:
                ratio += u.sub_(w).mul_(coef)
            write_rows(grad_a, rows, ratio.sub_(constant_N[rows, None]).mul_(scaled_p_a))
        if grad_b is not None:
            write_rows(grad_b, rows, v.exp_().mul_(scale_b[rows, None]).sub_(scaled_p_a))
    clear_inactive(active_N, grad_a, grad_b)


def _third(a_NV: Tensor, c_NV: Tensor, rows: slice | Tensor, temperature: float, difference: bool, out_RV: Tensor,
           scratch_RV: Tensor) -> Tensor:
    c_RV = scaled(c_NV, rows, temperature, out_RV)
    return c_RV.neg_().add_(scaled(a_NV, rows, temperature, scratch_RV)) if difference else c_RV
