"""Divergences whose one side is a mixture of both models, from vocabulary shards of the logits.

A mixture needs both normalisers first, the statistics of a KL and their all-gather; then the logits are read once more, and two
floats a row are all-reduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from ..from_logits import RowLoss
from ..kl.rows import Merged, whole_rows
from .rows import loss


@dataclass(frozen=True, kw_only=True)
class MixtureLoss(RowLoss):
    """Of (student, teacher) logits; `share` is beta or alpha, `normalisers` are the kernels of a KL."""

    objective: str
    share: float
    temperature: float
    normalisers: ModuleType
    kernels: ModuleType

    def evaluate(self, logits_NV, weights_N):
        options = {"weights": weights_N, "temperature": self.temperature}
        merged = whole_rows(self.normalisers, self.shard, logits_NV, **options)
        mixture = {"objective": self.objective, "share": self.share}
        sums_2N = self.shard.all_reduce(self.kernels.sums(*logits_NV, merged, **mixture, **options))
        return (loss(sums_2N, **mixture),), (*merged[:5], sums_2N)

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        *merged, sums_2N = state
        self.kernels.gradient(*logits_NV, Merged(*merged), sums_2N, scale_N / self.temperature, objective=self.objective,
                              share=self.share, temperature=self.temperature, grad_q=grads_NV[0], grad_p=grads_NV[1])
