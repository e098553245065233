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
    objective: str
    temperature: float
    shard: VocabShard
    kernels: ModuleType

    @property
    def reads_once(self) -> bool:
        """Whole rows on this rank, and an implementation that has the single launch."""
        return self.kernels.READS_ONCE and self.shard.ranks == 1

    @property
    def gradient_in_forward(self) -> bool:
        """With the single launch."""
        return self.reads_once

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

    def at_once(self, logits_NV, scale_N, grads_NV):
        grad_a, grad_b = self.ordered(*grads_NV)
        divergences_2N = self.kernels.loss_and_gradient(
            *self.ordered(*logits_NV), None, scale_N / self.temperature, temperature=self.temperature, grad_a=grad_a,
            grad_b=grad_b)
        return (divergences_2N[0],)
