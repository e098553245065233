"""Divergence per token between a student and a teacher, from vocabulary shards of their logits.

    reverse_kl  KL(q || p)        forward_kl  KL(p || q)        q = softmax(student / T), p = softmax(teacher / T), no factor T^2
    jsd, skew_forward_kl, skew_reverse_kl, tvd: as in `reference`; the gradients of all are in `kl_rows`

Each logit is read once forward and once backward. One all-gather of five floats a row makes the shards one; a mixture needs its
normalisers first, reads the logits once more, and all-reduces two floats. A column where the first distribution has mass and the
second has none makes a KL infinite: the loss comes out beyond 1e20, never NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from torch import Tensor
from torch.distributed import ProcessGroup

from . import launch, reference
from .from_logits import loss_from_logits
from .kl_rows import Merged, mixture_loss
from .reference import check_objective
from .shards import VocabShard


@dataclass(frozen=True)
class Divergence:
    """A RowLoss of (student, teacher) logits; `share` is beta or alpha."""

    outputs: ClassVar[int] = 1
    objective: str
    share: float
    temperature: float
    shard: VocabShard
    kernels: ModuleType

    @property
    def is_mixture(self) -> bool:
        """Whether one side is a mixture of both: its gradient needs two more sums over the vocabulary."""
        return self.objective not in ("reverse_kl", "forward_kl")

    @property
    def reads_once(self) -> bool:
        """A KL, whole rows on this rank, and an implementation that has the single launch."""
        return self.kernels.READS_ONCE and not self.is_mixture and self.shard.ranks == 1

    def of_rows(self, rows: slice | Tensor) -> Divergence:
        return self

    def ordered(self, student, teacher) -> tuple:
        """The first and the second argument of the KL."""
        return (teacher, student) if self.objective == "forward_kl" else (student, teacher)

    def evaluate(self, logits_NV, weights_N):
        a_NV, b_NV = self.ordered(*logits_NV)
        options = {"weights": weights_N, "temperature": self.temperature}
        merged = self.kernels.merge(self.shard.all_gather(self.kernels.statistics(a_NV, b_NV, **options)))
        if not self.is_mixture:
            return (merged.kl_ab,), merged[:5]
        mixture = {"objective": self.objective, "share": self.share}
        sums_2N = self.shard.all_reduce(self.kernels.mixture_sums(a_NV, b_NV, merged, **mixture, **options))
        return (mixture_loss(sums_2N, **mixture),), (*merged[:5], sums_2N)

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        scale_N = scale_N / self.temperature
        a_NV, b_NV = self.ordered(*logits_NV)
        grad_a, grad_b = self.ordered(*grads_NV)
        if self.is_mixture:
            *merged, sums_2N = state
            self.kernels.mixture_gradient(a_NV, b_NV, Merged(*merged), sums_2N, scale_N, objective=self.objective,
                                          share=self.share, temperature=self.temperature, grad_q=grad_a, grad_p=grad_b)
        else:
            self.kernels.gradient(a_NV, b_NV, None, Merged(*state), scale_N, temperature=self.temperature,
                                  grad_a=grad_a, grad_b=grad_b)

    def at_once(self, logits_NV, scale_N, grads_NV):
        grad_a, grad_b = self.ordered(*grads_NV)
        divergences_2N = self.kernels.loss_and_gradient(
            *self.ordered(*logits_NV), None, scale_N / self.temperature, temperature=self.temperature, grad_a=grad_a,
            grad_b=grad_b)
        return (divergences_2N[0],)


def divergence(x: Tensor, objective: str, beta: float, alpha: float, temperature: float, shard: VocabShard) -> Divergence:
    """The divergence for tensors like x. ValueError for settings that no formula covers."""
    check_objective(objective, beta, alpha, temperature)
    return Divergence(objective, beta if objective == "jsd" else alpha, temperature, shard, launch.kernels(x, "kl"))


def kl_div(student_logits: Tensor, teacher_logits: Tensor, *, objective: str = "reverse_kl", beta: float = 0.5,
           alpha: float = 0.1, temperature: float = 1.0, weights: Tensor | None = None, valid_vocab: int | None = None,
           vocab_start: int | None = None, tp_group: ProcessGroup | None = None, inplace: bool = False) -> Tensor:
    """[N] float32 divergence of each row of [N, Vp] logits (float32, bfloat16 or float16), times its weight.

    Gradient to whichever of the two requires it, exact for any upstream gradient. `weights` [N]: a row of weight 0 is not read.
    `valid_vocab`: real columns of the whole vocabulary. `vocab_start`: this rank's first column, rank * Vp unless given.
    `inplace`: backward writes the gradient over the logits, which nothing else may then need; one backward only.
    """
    if launch.implementation(student_logits) == "reference":
        return reference.kl_div(student_logits, teacher_logits, objective=objective, beta=beta, alpha=alpha,
                                temperature=temperature, weights=weights, valid_vocab=valid_vocab, vocab_start=vocab_start,
                                tp_group=tp_group)
    loss = divergence(student_logits, objective, beta, alpha, temperature, VocabShard(valid_vocab, vocab_start, tp_group))
    return loss_from_logits(loss, weights, inplace, student_logits, teacher_logits)[0]
