"""Divergences in plain torch with the gradient written out, a few rows at a time: the CPU's kernels.

A chunk of rows is copied into float32 scratch that stays in the cache, so nothing of size [N, V] is made but the gradient.
With u = a/T - A, v = b/T - B, w = c/T - C, each centred on its own maximum over the shard (A, B, C):

    statistics   A, SA = sum e^u, D = sum e^u (u - v), B, SB = sum e^v   (third tensor: E = sum e^u (u - w), C, SC = sum e^w)
    merge        A* = max A, D* = sum e^(A - A*) (D + ((A - A*) - (B - B*)) SA);      KL(a || b) = D*/SA* - log SA* + log SB*
    gradient     da = g p_a (log p_a - log p_b - KL_ab + coef (log p_a - log p_c - KL_ac)) / T,      db = g (p_b - p_a) / T
                 where p_a = e^u / SA* and log p_a - log p_b - KL_ab = u - v - D*/SA*, centred on A* and B*

D is centred on both maxima, and maximum and sum are never added into one log-sum-exp: an offset between two models, or logits of
30,000, would cost the digits that matter. The same five (or eight) numbers merge over vocabulary splits and over tensor-parallel
ranks, in one all-gather. A mixture m needs both normalisers first and then two more sums, x and y below (q student, p teacher,
r = p q / m):

    jsd              m = beta p + (1 - beta) q       x = sum p log p/m,  y = sum q log q/m        loss = beta x + (1 - beta) y
                     dp = beta p (log p/m - x)       dq = (1 - beta) q (log q/m - y)
    skew, KL(p||m)   m = alpha p + (1 - alpha) q     x = sum p log p/m,  y = sum r                loss = x
                     dp = p (log p/m - x) + (1 - alpha) (r - p y)            dq = -(1 - alpha) (r - q y)
    tvd              x = sum_{q > p} q,  y = sum_{q > p} p,  loss = x - y    dq = q ([q > p] - x)      dp = -p ([q > p] - y)

N rows, V columns here, K statistics (5 or 8), P partial statistics, R rows of one chunk. `kl_triton` has the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .shards import FLOOR

READS_ONCE = False  # no `loss_and_gradient` here
CHUNK_NUMBERS = 2**19  # of one scratch tensor: 2 MB in float32, about a core's second-level cache


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


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def chunk_rows(x_NV: Tensor) -> int:
    """How many rows are worked on at a time."""
    return max(1, min(x_NV.shape[0], CHUNK_NUMBERS // max(1, x_NV.shape[1])))


def row_chunks(x_NV: Tensor, active_N: Tensor | None) -> Iterator[slice | Tensor]:
    """Rows to work on: slices of all rows, or indices of the active ones."""
    step = chunk_rows(x_NV)
    if active_N is None or bool(active_N.all()):
        return (slice(i, i + step) for i in range(0, x_NV.shape[0], step))
    return iter(active_N.nonzero()[:, 0].split(step))


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
    top_a, top_b = A.amax(0), B.amax(0)
    scale_a = (A - top_a).exp()
    sum_a, sum_b = (scale_a * SA).sum(0), ((B - top_b).exp() * SB).sum(0)

    def divergence(D: Tensor, B: Tensor, top_b: Tensor, sum_b: Tensor) -> Tensor:
        return (scale_a * (D + ((A - top_a) - (B - top_b)) * SA)).sum(0) / sum_a - sum_a.log() + sum_b.log()

    merged = Merged(top_a, sum_a, top_b, sum_b, divergence(D, B, top_b, sum_b))
    if not third:
        return merged
    E, C, SC = third
    top_c = C.amax(0)
    sum_c = ((C - top_c).exp() * SC).sum(0)
    return merged._replace(top_c=top_c, sum_c=sum_c, kl_ac=divergence(E, C, top_c, sum_c))


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


def mixture_sums(q_NV: Tensor, p_NV: Tensor, merged: Merged, *, objective: str, share: float, weights: Tensor | None = None,
                 temperature: float = 1.0) -> Tensor:
    """[2, N]: x and y of this shard. `merged` has student first; `share` is beta or alpha."""
    sums_2N = q_NV.new_zeros(2, q_NV.shape[0], dtype=accumulation_dtype(q_NV))
    buffers = scratch(q_NV, 6)
    for rows in row_chunks(q_NV, None if weights is None else weights != 0):
        log_q, log_p = _log_probs(q_NV, p_NV, merged, rows, temperature, buffers)
        if objective == "skew_reverse_kl":
            log_q, log_p = log_p, log_q  # the same formulas with the models exchanged
        q, p, m, log_m = (buffer[: len(log_q)] for buffer in buffers[2:])
        torch.exp(log_q, out=q), torch.exp(log_p, out=p)
        if objective == "tvd":
            more = q > p
            x, y = (q * more).sum(-1), (p * more).sum(-1)
        else:
            _mixture(p, q, share, m, log_m)
            x = log_p.sub_(log_m).mul_(p).sum(-1)
            y = (log_q.sub_(log_m).mul_(q) if objective == "jsd" else p.mul_(q).div_(m)).sum(-1)
        sums_2N[:, rows] = torch.stack([x, y])
    return sums_2N


def mixture_loss(sums_2N: Tensor, *, objective: str, share: float) -> Tensor:
    """[N] divergence from the sums over the whole vocabulary."""
    x, y = sums_2N
    return {"jsd": share * x + (1 - share) * y, "tvd": x - y}.get(objective, x)


def mixture_gradient(q_NV: Tensor, p_NV: Tensor, merged: Merged, sums_2N: Tensor, scale_N: Tensor, *, objective: str,
                     share: float, temperature: float = 1.0, grad_q: Tensor | None = None, grad_p: Tensor | None = None) -> None:
    """Write the gradients times scale_N into grad_q (student) and grad_p (teacher), which may be the logits themselves."""
    active_N = scale_N != 0
    buffers = scratch(q_NV, 6)
    swap = objective == "skew_reverse_kl"
    for rows in row_chunks(q_NV, active_N):
        log_q, log_p = _log_probs(q_NV, p_NV, merged, rows, temperature, buffers)
        x, y = sums_2N[:, rows, None]
        others = [buffer[: len(log_q)] for buffer in buffers[2:]]
        dq, dp = _mixture_row_gradients(*((log_p, log_q) if swap else (log_q, log_p)), *others, x, y, objective, share)
        for grad_NV, d in ((grad_p, dq), (grad_q, dp)) if swap else ((grad_q, dq), (grad_p, dp)):
            if grad_NV is not None:
                write_rows(grad_NV, rows, d.mul_(scale_N[rows, None]))
    clear_inactive(active_N, grad_q, grad_p)


def _mixture_row_gradients(log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, m: Tensor, log_m: Tensor, x: Tensor, y: Tensor,
                  objective: str, share: float) -> tuple[Tensor, Tensor]:
    """(dq, dp); q, p, m and log_m are scratch."""
    torch.exp(log_q, out=q), torch.exp(log_p, out=p)
    if objective == "tvd":
        more = torch.gt(q, p, out=m)
        return q.mul_(torch.sub(more, x, out=log_q)), p.mul_(torch.sub(y, more, out=log_p))
    _mixture(p, q, share, m, log_m)
    if objective == "jsd":
        return log_q.sub_(log_m).sub_(y).mul_(q).mul_(1 - share), log_p.sub_(log_m).sub_(x).mul_(p).mul_(share)
    r = torch.mul(p, q, out=log_q).div_(m)
    dp = log_p.sub_(log_m).sub_(x).mul_(p).add_(torch.addcmul(r, p, y, value=-1, out=m), alpha=1 - share)
    return q.mul_(y).sub_(r).mul_(1 - share), dp


def _mixture(p: Tensor, q: Tensor, share: float, m: Tensor, log_m: Tensor) -> None:
    """m, never 0: where both models underflow, log m and p q / m are multiplied by 0 and have to be finite."""
    torch.lerp(q, p, share, out=m).clamp_min_(torch.finfo(p.dtype).tiny)
    torch.log(m, out=log_m)


def _log_probs(q_NV: Tensor, p_NV: Tensor, merged: Merged, rows: slice | Tensor, temperature: float,
               buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    parts = ((q_NV, merged.top_a, merged.sum_a, buffers[0]), (p_NV, merged.top_b, merged.sum_b, buffers[1]))
    return tuple(scaled(x_NV, rows, temperature, x_).sub_(top_N[rows, None]).sub_(sum_N[rows, None].log()).clamp_min_(FLOOR)
                 for x_NV, top_N, sum_N, x_ in parts)


def scratch(x_NV: Tensor, tensors: int) -> list[Tensor]:
    """Room for one chunk each, in the dtype that sums are made in; used again and again, it stays in the cache."""
    return [x_NV.new_empty(chunk_rows(x_NV), x_NV.shape[1], dtype=accumulation_dtype(x_NV)) for _ in range(tensors)]


def scaled(x_NV: Tensor, rows: slice | Tensor, temperature: float, out_RV: Tensor) -> Tensor:
    """Some rows divided by the temperature, in scratch."""
    x_RV = x_NV[rows]
    x_RV = out_RV[: len(x_RV)].copy_(x_RV)
    return x_RV if temperature == 1 else x_RV.div_(temperature)


def _third(a_NV: Tensor, c_NV: Tensor, rows: slice | Tensor, temperature: float, difference: bool, out_RV: Tensor,
           scratch_RV: Tensor) -> Tensor:
    c_RV = scaled(c_NV, rows, temperature, out_RV)
    return c_RV.neg_().add_(scaled(a_NV, rows, temperature, scratch_RV)) if difference else c_RV


def centred(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """x minus its row maximum, in place, and that maximum; an empty row has the maximum FLOOR."""
    if x_RV.shape[1] == 0:
        return x_RV, x_RV.new_full((x_RV.shape[0],), FLOOR)
    top_R1 = x_RV.amax(-1, keepdim=True).clamp_min_(FLOOR)
    return x_RV.sub_(top_R1).clamp_min_(FLOOR), top_R1[:, 0]


def write_rows(out_NV: Tensor, rows: slice | Tensor, x_RV: Tensor) -> None:
    """`rows` as `row_chunks` gives them; x is rounded to out's dtype."""
    if isinstance(rows, slice):
        out_NV[rows].copy_(x_RV)  # rounds while it copies
    else:
        out_NV[rows] = x_RV.to(out_NV.dtype)


def clear_inactive(active_N: Tensor, *grads_NV: Tensor | None) -> None:
    """Zeros in the gradients' rows that nothing else writes."""
    if not bool(active_N.all()):
        for grad_NV in grads_NV:
            if grad_NV is not None:
                grad_NV[~active_N] = 0
