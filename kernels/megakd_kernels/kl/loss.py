"""Reverse and forward KL from vocabulary shards of the logits.

Each logit is read once forward and once backward. One all-gather of five floats a row makes the shards one.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from ..from_logits import RowLoss
from .rows import Merged, whole_rows


@dataclass(frozen=True, kw_only=True)
class KLLoss(RowLoss):
    """Of (student, teacher) logits."""

    objective: str
    temperature: float
    kernels: ModuleType

    def ordered(self, student, teacher) -> tuple:
        """The first and the second argument of the KL."""
        return (teacher, student) if self.objective == "forward_kl" else (student, teacher)

    def evaluate(self, logits_NV, weights_N):
        options = {"weights": weights_N, "temperature": self.temperature}
        merged = whole_rows(self.kernels, self.shard, self.ordered(*logits_NV), **options)
        return (merged.kl_ab,), merged[:5]

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        grad_a, grad_b = self.ordered(*grads_NV)
        self.kernels.gradient(*self.ordered(*logits_NV), None, Merged(*state), scale_N / self.temperature,
                              temperature=self.temperature, grad_a=grad_a, grad_b=grad_b)
