"""The divergence from a truncated teacher as a RowLoss of one model's logits.

    z_k the tokens' logits, z_rest = log sum of e^z over all others       log q = log_softmax of these K + 1
    dz_v = dz_rest e^(z_v - z_rest) for the others                        dz_k from the divergence's function, by autograd

K + 3 floats a row and shard (the tokens' logits, the others' maximum and sum, the minimum) merge with one all-gather; what follows
has K + 1 columns and is the same on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from ..divergence import DivergenceFunction, Objective, divergence_function
from ..from_logits import RowLoss
from ..shards import VocabShard, merge_sums
from . import TopKRows
from . import rows as row_functions
from .reference import bias_bounds, check_topk, teacher_log_probs


@dataclass(frozen=True, kw_only=True)
class TopKLoss(RowLoss):
    """Of a student's logits; `start` is the id of the first column here."""

    outputs: ClassVar[int] = 3  # the loss, and what a forward and a reverse KL can be too low by
    rows: TopKRows
    function: DivergenceFunction
    start: int
    kernels: ModuleType

    def of_rows(self, rows: slice | Tensor) -> TopKLoss:
        return replace(self, rows=self.rows[rows])

    def columns_NK(self, width: int) -> Tensor:
        """The tokens' columns here, `width` for those of other ranks."""
        columns_NK = self.rows.ids_NK.long() - self.start
        return columns_NK.where((columns_NK >= 0) & (columns_NK < width), width)

    def evaluate(self, logits_NV, weights_N):
        columns_NK = self.columns_NK(logits_NV[0].shape[1])
        stats_PKN = self.shard.all_gather(self.kernels.statistics(logits_NV[0], columns_NK, weights_N))
        tokens_NK, bottom_N = stats_PKN[:, :-3].amax(0).t(), stats_PKN[:, -1].amin(0)
        top_N, sum_N = merge_sums(stats_PKN[:, -3], stats_PKN[:, -2])
        base_N1 = torch.cat([tokens_NK, top_N[:, None]], -1).amax(-1, keepdim=True)
        rest_N1 = (top_N[:, None] - base_N1) + sum_N.log()[:, None]  # not maximum + logarithm: that would cost digits
        logits_NB = torch.cat([tokens_NK - base_N1, rest_N1], -1)
        loss_N, slopes_NB = self.of_buckets(logits_NB, weights_N)
        ends_N2 = torch.stack([top_N, bottom_N], -1) - base_N1
        bounds = self.bias(logits_NB, ends_N2, weights_N)
        return (loss_N, *bounds), (slopes_NB, top_N, sum_N)

    def bias(self, logits_NB: Tensor, ends_N2: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """The bounds of `topk`, forward and reverse; ends: the others' highest logit and the lowest of all."""
        log_sum_N1 = logits_NB.logsumexp(-1, keepdim=True)
        log_p_NB = teacher_log_probs(self.rows, weights_N, logits_NB.dtype)
        return bias_bounds((logits_NB - log_sum_N1)[:, -1], (ends_N2 - log_sum_N1).unbind(-1), log_p_NB, self.rows.log_min_N)

    def of_buckets(self, logits_NB: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss [N] and its gradient with respect to the buckets' logits [N, K + 1]."""
        with torch.enable_grad():
            logits_NB = logits_NB.detach().requires_grad_()
            log_p = teacher_log_probs(self.rows, weights_N, logits_NB.dtype)
            loss_N = self.function(torch.log_softmax(logits_NB, -1), log_p, lambda x: x.sum(-1))
            (slopes_NB,) = torch.autograd.grad(loss_N.sum(), logits_NB)
        return loss_N.detach(), slopes_NB

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        slopes_NB, top_N, sum_N = state
        slopes_NB = torch.where((scale_N != 0)[:, None], slopes_NB * scale_N[:, None], 0.0)
        self.kernels.gradient(logits_NV[0], self.columns_NK(logits_NV[0].shape[1]), slopes_NB, top_N, sum_N, grads_NV[0])


def topk_loss(x: Tensor, rows: TopKRows, objective: Objective, beta: float, alpha: float, temperature: float, shard: VocabShard, *,
              width: int) -> TopKLoss:
    """The loss for hidden states or logits like x, on a shard `width` columns wide. ValueError for settings it cannot keep exact."""
    check_topk(x, rows, objective, beta, alpha, temperature, shard)
    function = divergence_function(objective, beta, alpha)
    return TopKLoss(rows=rows, function=function, shard=shard, start=shard.start(width), kernels=row_functions)
