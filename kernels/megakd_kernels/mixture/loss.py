"""Divergences whose one side is a mixture of both models, from vocabulary shards of the logits.

A mixture needs both normalisers first, the statistics of a KL and their all-gather; then the logits are read once more, and two
floats a row are all-reduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from torch import Tensor

from ..kl.rows import Merged
from ..shards import VocabShard
from .rows import loss


@dataclass(frozen=True)
class MixtureLoss:
    """A RowLoss of (student, teacher) logits; `share` is beta or alpha, `normalisers` are the kernels of a KL."""

    outputs: ClassVar[int] = 1
    reads_once: ClassVar[bool] = False
    objective: str
    share: float
    temperature: float
    shard: VocabShard
    normalisers: ModuleType
    kernels: ModuleType

    def of_rows(self, rows: slice | Tensor) -> MixtureLoss:
        return self

    def evaluate(self, logits_NV, weights_N):
        options = {"weights": weights_N, "temperature": self.temperature}
        merged = self.normalisers.merge(self.shard.all_gather(self.normalisers.statistics(*logits_NV, **options)))
        mixture = {"objective": self.objective, "share": self.share}
        sums_2N = self.shard.all_reduce(self.kernels.sums(*logits_NV, merged, **mixture, **options))
        return (loss(sums_2N, **mixture),), (*merged[:5], sums_2N)

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        *merged, sums_2N = state
        self.kernels.gradient(*logits_NV, Merged(*merged), sums_2N, scale_N / self.temperature, objective=self.objective,
                              share=self.share, temperature=self.temperature, grad_q=grads_NV[0], grad_p=grads_NV[1])
