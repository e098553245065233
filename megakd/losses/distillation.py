"""The losses of the papers, per supervised token, from the rows of both models. q is the student, p the teacher.

N supervised tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import megakd_kernels
import torch
from megakd_kernels import TopKRows, VocabShard
from megakd_kernels.divergence import Objective
from torch import Tensor

from megakd.losses.token_loss import HeadRows, LogitRows, Rows, TokenLoss

BIASES = ("forward_kl_bias", "reverse_kl_bias")  # of a truncated teacher: what the KL of whole rows is above, at most


@dataclass(frozen=True)
class Divergence:
    """Which divergence between p and q, at which temperature; its mixture's shares where it has one."""

    objective: Objective = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.1

    @property
    def name(self) -> str:
        """As it is logged; of a function its own."""
        return self.objective if isinstance(self.objective, str) else self.objective.__name__

    def __call__(self, q: HeadRows, p: Rows, vocabulary: VocabShard) -> Tensor:
        """Per token [N], with gradient to whichever side requires it; of a truncated p over its K tokens and one bucket for the rest."""
        return self.with_bias(q, p, vocabulary)[0]

    def with_bias(self, q: HeadRows, p: Rows, vocabulary: VocabShard) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, and of a truncated p what KL(p‖q) and KL(q‖p) of whole rows are above those of the buckets, at most, to be logged."""
        options = self._options(q, vocabulary)
        if not isinstance(p, TopKRows):
            return megakd_kernels.fused_linear_kl(q.hidden_NH, q.head_VpH, *_given(p), **options), {}
        distance, *bounds = megakd_kernels.fused_linear_topk_kl_with_bias(q.hidden_NH, q.head_VpH, p, **options)
        return distance, dict(zip(BIASES, bounds))

    def beside_labels(
        self, q: HeadRows, p: Rows, labels_N: Tensor, vocabulary: VocabShard, *, label_coef: float, distance_coef: float
    ) -> TokenLoss:
        """label_coef·(−log q(label)) + distance_coef·D, the labels as of the same tokens; both are logged as they are."""
        options = self._options(q, vocabulary) | {"label_coef": label_coef, "distance_coef": distance_coef}
        operator = megakd_kernels.fused_linear_topk_kd_loss if isinstance(p, TopKRows) else megakd_kernels.fused_linear_kd_loss
        total, lm, distance, *bounds = operator(q.hidden_NH, q.head_VpH, *_given(p), labels_N, **options)
        return TokenLoss(total, {"loss/total": total, "loss/lm": lm, f"loss/{self.name}": distance} | as_logs(dict(zip(BIASES, bounds))))

    def _options(self, q: HeadRows, vocabulary: VocabShard) -> dict:
        return {
            "objective": self.objective,
            "temperature": self.temperature,
            "beta": self.beta,
            "alpha": self.alpha,
            "accumulate_into_main_grad": sums_in_main_grad(q),
            **vocabulary.arguments,
        }


def _given(p: Rows) -> tuple:
    """The teacher's side as the kernels take it."""
    if isinstance(p, TopKRows):
        return (p,)
    return (p.logits_NVp, None) if isinstance(p, LogitRows) else (p.hidden_NH, p.head_VpH)


def sums_in_main_grad(rows: HeadRows) -> bool:
    """Whether the head's gradient, summed in float32, is added where Megatron's data parallelism sums it: under bfloat16 it is then
    not rounded on the way."""
    return hasattr(rows.head_VpH, "main_grad")


def label_loss(q: HeadRows, labels_N: Tensor, vocabulary: VocabShard, weights_N: Tensor | None = None) -> Tensor:
    """−log q(label) times the weights, per token [N]."""
    return megakd_kernels.fused_linear_cross_entropy(
        q.hidden_NH,
        q.head_VpH,
        labels_N,
        weights=weights_N,
        accumulate_into_main_grad=sums_in_main_grad(q),
        **vocabulary.arguments,
    )


def sft_loss(q: HeadRows, labels_N: Tensor, vocabulary: VocabShard) -> TokenLoss:
    """−log q(label)."""
    loss = label_loss(q, labels_N, vocabulary)
    return TokenLoss(loss, {"loss/lm": loss})


def reverse_kl_loss(q: HeadRows, p: Rows, vocabulary: VocabShard) -> TokenLoss:
    """KL(q‖p), with gradient to the student."""
    loss, bias = Divergence("reverse_kl").with_bias(q, p, vocabulary)
    return TokenLoss(loss, {"loss/reverse_kl": loss} | as_logs(bias))


def kd_loss(
    q: HeadRows, p: Rows, labels_N: Tensor, vocabulary: VocabShard, *, kd_ratio: float, divergence: Divergence
) -> TokenLoss:
    """(1 − r)·(−log q(label)) + r·D(p, q): with KL(p‖q) that of Hinton et al. 2015 as MiniLLM's `finetune.py` weighs it."""
    return divergence.beside_labels(q, p, labels_N, vocabulary, label_coef=1 - kd_ratio, distance_coef=kd_ratio)


def as_logs(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the names that losses have in training."""
    return {f"loss/{name}": value for name, value in values.items()}


def priming_loss(q: HeadRows, p: Rows, labels_N: Tensor, vocabulary: VocabShard, *, alpha: float, temperature: float) -> TokenLoss:
    """α·(−log q(label)) + (1 − α)·T²·KL(q_T‖p_T), the KL logged as it is, without T² (response priming)."""
    divergence = Divergence("reverse_kl", temperature)
    return divergence.beside_labels(q, p, labels_N, vocabulary, label_coef=alpha, distance_coef=(1 - alpha) * temperature**2)


def function_of_log_q(f: Callable[[Tensor], Tensor], q: HeadRows, labels_N: Tensor, vocabulary: VocabShard) -> Tensor:
    """f(log q(label)) per token, f any differentiable function of each token's log-probability.

    The fused head makes its weight's gradient in the forward pass, with one factor a token known beforehand: f' comes from a pass
    over log q alone.
    """
    with torch.no_grad():
        log_q = -label_loss(q, labels_N, vocabulary)
    with torch.enable_grad():
        value = f(log_q.requires_grad_())
        (slope,) = torch.autograd.grad(value.sum(), log_q)
    tangent = label_loss(q, labels_N, vocabulary, weights_N=-slope)
    return value.detach() + tangent - tangent.detach()


PROMPT_LOSSES = ("loss/prompt", "loss/prompt_kd", "loss/prompt_base")  # what it logs


def prompt_loss(
    prompted: HeadRows,
    q: HeadRows,
    p: HeadRows,
    vocabulary: VocabShard,
    *,
    base_coef: float,
    kinds: tuple[str, str] = ("reverse", "reverse"),
) -> TokenLoss:
    """KL(p_P‖q) + c·KL(p_P‖p), with gradient to the prompted teacher's hidden states (PromptKD, its prompt tuning objective).

    Either term may be `forward` instead, KL(·‖p_P): the paper's ablation.
    """
    if kinds == ("reverse", "reverse"):
        loss, kd, base = megakd_kernels.fused_linear_promptkd_loss(
            prompted.hidden_NH,
            prompted.head_VpH,
            p.hidden_NH,
            q.hidden_NH,
            q.head_VpH,
            base_coef=base_coef,
            **vocabulary.arguments,
        )
    else:
        kd, base = (Divergence(f"{kind}_kl")(prompted, other.detached(), vocabulary) for kind, other in zip(kinds, (q, p)))
        loss = kd + base_coef * base
    return TokenLoss(loss, dict(zip(PROMPT_LOSSES, (loss, kd, base))))
