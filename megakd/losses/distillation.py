"""The losses of the papers, per supervised token, from the hidden states of both models. q is the student, p the teacher.

N supervised tokens, H hidden size, V vocabulary (this rank's columns).

Every function gives a dict of values per token [N]; its first entry is what is minimised, the others are its parts for the log.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import megakd_kernels
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

Hidden = tuple[Tensor, Tensor]
"""Hidden states [N, H] and the output layer [V, H] that turns them into logits."""


@dataclass(frozen=True)
class VocabularySplit:
    """How the vocabulary lies over ranks, the same for both models: ids at or past `size` are padding and have no probability."""

    size: int
    tp_group: ProcessGroup

    @property
    def arguments(self) -> dict:
        """Keywords of megakd_kernels' losses. A group of one rank is None there: no collective is called."""
        return {"valid_vocab": self.size, "tp_group": self.tp_group if self.tp_group.size() > 1 else None}


@dataclass(frozen=True)
class Divergence:
    """Which divergence between p and q, at which temperature; its mixture's shares where it has one."""

    objective: str = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1

    def __call__(self, student: Hidden, teacher: Hidden, vocabulary: VocabularySplit) -> Tensor:
        """Per token [N], with gradient to whichever side requires it."""
        return megakd_kernels.fused_linear_kl(*student, *teacher, **vars(self), **into_main_grad(student), **vocabulary.arguments)


def into_main_grad(student: Hidden) -> dict:
    """Keyword of megakd_kernels' losses: the head's gradient, summed in float32, is added where Megatron's data parallelism sums it,
    and under bfloat16 not rounded on the way."""
    return {"accumulate_into_main_grad": hasattr(student[1], "main_grad")}


def sft_loss(student: Hidden, labels_N: Tensor, vocabulary: VocabularySplit) -> dict[str, Tensor]:
    """−log q(label)."""
    return {"loss/lm": label_loss(student, labels_N, vocabulary)}


def label_loss(student: Hidden, labels_N: Tensor, vocabulary: VocabularySplit, weights_N: Tensor | None = None) -> Tensor:
    """−log q(label) times the weights, per token [N]."""
    options = into_main_grad(student) | vocabulary.arguments
    return megakd_kernels.fused_linear_cross_entropy(*student, labels_N, weights=weights_N, **options)


def function_of_log_q(f: Callable[[Tensor], Tensor], student: Hidden, labels_N: Tensor, vocabulary: VocabularySplit) -> Tensor:
    """f(log q(label)) per token, f any differentiable function of each token's log-probability.

    The fused head makes its weight's gradient in the forward pass, with one factor a token known beforehand: f' comes from a pass
    over log q alone.
    """
    with torch.no_grad():
        log_q = -label_loss(student, labels_N, vocabulary)
    with torch.enable_grad():
        value = f(log_q.requires_grad_())
        (slope,) = torch.autograd.grad(value.sum(), log_q)
    tangent = label_loss(student, labels_N, vocabulary, weights_N=-slope)
    return value.detach() + tangent - tangent.detach()


def kd_loss(
    student: Hidden, teacher: Hidden, labels_N: Tensor, vocabulary: VocabularySplit, *, kd_ratio: float, divergence: Divergence
) -> dict[str, Tensor]:
    """(1 − r)·(−log q(label)) + r·D(p, q): with KL(p‖q) that of Hinton et al. 2015 as MiniLLM's `finetune.py` weighs it."""
    with torch.set_grad_enabled(kd_ratio < 1 and torch.is_grad_enabled()):  # at 1 it is for the log alone
        lm = label_loss(student, labels_N, vocabulary)
    distance = divergence(student, teacher, vocabulary)
    return {"loss/total": (1 - kd_ratio) * lm + kd_ratio * distance, "loss/lm": lm, f"loss/{divergence.objective}": distance}


def reverse_kl_loss(student: Hidden, teacher: Hidden, vocabulary: VocabularySplit) -> dict[str, Tensor]:
    """KL(q‖p), with gradient to the student."""
    return {"loss/reverse_kl": Divergence("reverse_kl")(student, teacher, vocabulary)}


def prompt_loss(
    prompted: Hidden, student: Hidden, base_hidden_NH: Tensor, vocabulary: VocabularySplit, *, base_coef: float
) -> dict[str, Tensor]:
    """KL(p_P‖q) + c·KL(p_P‖p), with gradient to the prompted teacher's hidden states (PromptKD, its prompt tuning objective)."""
    loss, kd, base = megakd_kernels.fused_linear_promptkd_loss(
        *prompted, base_hidden_NH, *student, base_coef=base_coef, **vocabulary.arguments
    )
    return {"loss/prompt": loss, "loss/prompt_kd": kd, "loss/prompt_base": base}


def prompt_loss_of_kinds(
    prompted: Hidden,
    student: Hidden,
    base_hidden_NH: Tensor,
    vocabulary: VocabularySplit,
    *,
    base_coef: float,
    kinds: tuple[str, str],
) -> dict[str, Tensor]:
    """`prompt_loss` with either term `reverse`, KL(p_P‖·), or `forward`, KL(·‖p_P): PromptKD's ablation."""
    others = student, (base_hidden_NH, prompted[1])
    kd, base = (
        megakd_kernels.fused_linear_kl(*prompted, *other, objective=f"{kind}_kl", **vocabulary.arguments)
        for kind, other in zip(kinds, others)
    )
    return {"loss/prompt": kd + base_coef * base, "loss/prompt_kd": kd, "loss/prompt_base": base}
