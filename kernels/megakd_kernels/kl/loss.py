"""Reverse and forward KL from vocabulary shards of the logits.

Each logit is read once forward and once backward. One all-gather of five floats a row makes the shards one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from torch import Tensor

from ..shards import VocabShard
from .rows import Merged


@dataclass(frozen=True)
class KLLoss:
    """A RowLoss of (student, teacher) logits."""

    outputs: ClassVar[int] = 1
    reads_once: ClassVar[bool] = False
    objective: str
    temperature: float
    shard: VocabShard
    kernels: ModuleType

    def of_rows(self, rows: slice | Tensor) -> KLLoss:
        return self

    def ordered(self, student, teacher) -> tuple:
        """The first and the second argument of the KL."""
        return (teacher, student) if self.objective == "forward_kl" else (student, teacher)

    def evaluate(self, logits_NV, weights_N):
        stats_PKN = self.kernels.statistics(*self.ordered(*logits_NV), weights=weights_N, temperature=self.temperature)
        merged = self.kernels.merge(self.shard.all_gather(stats_PKN))
        return (merged.kl_ab,), merged[:5]

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        grad_a, grad_b = self.ordered(*grads_NV)
        self.kernels.gradient(*self.ordered(*logits_NV), None, Merged(*state), scale_N / self.temperature,
                              temperature=self.temperature, grad_a=grad_a, grad_b=grad_b)
