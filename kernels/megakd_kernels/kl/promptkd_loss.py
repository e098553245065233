"""The loss of PromptKD's soft prompt, from vocabulary shards of three models' logits, with gradient to one of them.

    kd = KL(t || s),  base = KL(t || b),  loss = kd + c base       t prompted teacher, s student, b teacher without the prompt
    d loss / dt = p_t (log p_t - log p_s - kd + c (log p_t - log p_b - base)) / T

One pass over three tensors makes the statistics (8 floats a row, one all-gather), a second the gradient; c is read at run time.
b comes as logits or, where the head is shared, as the difference d = t - b: bfloat16 logits of two close models agree in most of
their bits, so that their difference keeps few of its own, while d rounded by itself keeps eight.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import launch
from ..from_logits import RowLoss, loss_from_logits
from ..shards import VocabShard, check_temperature
from . import reference
from .rows import Merged, whole_rows


@dataclass(frozen=True, kw_only=True)
class PromptLoss(RowLoss):
    """Of (prompted, student) or (prompted, student, base or difference) logits."""

    outputs: ClassVar[int] = 3
    coef: float | Tensor
    difference: bool
    temperature: float
    kernels: ModuleType

    def evaluate(self, logits_NV, weights_N):
        options = {"weights": weights_N, "temperature": self.temperature, "difference": self.difference}
        merged = whole_rows(self.kernels, self.shard, logits_NV, **options)
        base_N = torch.zeros_like(merged.kl_ab) if merged.kl_ac is None else merged.kl_ac
        return self.with_parts(merged.kl_ab, base_N), tuple(merged)

    def with_parts(self, kd_N: Tensor, base_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, kd, base), each [N]."""
        return kd_N + self.coef * base_N, kd_N, base_N

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        t_NV, s_NV, *third = logits_NV
        self.kernels.gradient(t_NV, s_NV, third[0] if third else None, Merged(*state), scale_N / self.temperature,
                              temperature=self.temperature, coef=self.coef, difference=self.difference, grad_a=grads_NV[0])


def prompt_loss(x: Tensor, coef: float | Tensor, difference: bool, temperature: float, shard: VocabShard) -> PromptLoss:
    """The loss for tensors like x."""
    check_temperature(temperature)
    kernels = launch.kernels(x, "kl")
    return PromptLoss(coef=coef, difference=difference, temperature=temperature, shard=shard, kernels=kernels)


def promptkd_loss(prompted_logits: Tensor, student_logits: Tensor, base_logits: Tensor | None = None, *,
                  base_coef: float | Tensor, base_delta: Tensor | None = None, temperature: float = 1.0,
                  weights: Tensor | None = None, valid_vocab: int | None = None, vocab_start: int | None = None,
                  tp_group: ProcessGroup | None = None, inplace: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_N, kd_N, base_N), each times its row's weight: loss = kd + base_coef * base, and its parts to be logged.

    Gradient of the loss to the prompted logits only; kd_N and base_N carry none. `base_delta`, prompted minus base logits,
    replaces `base_logits`; without both, base is zero. The other options are those of `kl_div`.
    """
    if base_logits is not None and base_delta is not None:
        raise ValueError("promptkd_loss takes the base teacher once: pass base_logits or base_delta, not both")
    if launch.implementation(prompted_logits) == "reference":
        return reference.promptkd_loss(prompted_logits, student_logits, base_logits, base_coef=base_coef, base_delta=base_delta,
                                       temperature=temperature, weights=weights, valid_vocab=valid_vocab, vocab_start=vocab_start,
                                       tp_group=tp_group)
    third_NV = base_delta if base_delta is not None else base_logits
    others_NV = [x.detach() for x in (student_logits, third_NV) if x is not None]
    loss = prompt_loss(prompted_logits, base_coef, base_delta is not None, temperature,
                       VocabShard(valid_vocab, vocab_start, tp_group))
    return loss_from_logits(loss, weights, inplace, prompted_logits, *others_NV)
