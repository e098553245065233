"""The fused heads in plain, differentiable torch: hidden states to logits, and the loss of those."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from ..cross_entropy.reference import cross_entropy
from ..divergence import Objective
from ..divergence.reference import kl_div
from ..kl.reference import promptkd_loss
from ..shards import CopyToShards, VocabShard


def head(hidden_NH: Tensor, weight_VH: Tensor | None, tp_group: ProcessGroup | None) -> Tensor:
    """[N, Vp] logits; the hidden states' gradient is summed over the ranks. Without a head they are logits, and constants."""
    if weight_VH is None:
        return hidden_NH.detach()
    return CopyToShards.apply(hidden_NH, VocabShard(tp_group=tp_group)) @ weight_VH.t()


def fused_linear_kl(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None, *,
                    objective: Objective = "reverse_kl", beta: float = 0.5, alpha: float = 0.1, temperature: float = 1.0,
                    weights: Tensor | None = None, valid_vocab: int | None = None, vocab_start: int | None = None,
                    tp_group: ProcessGroup | None = None, chunk_rows: int | None = None,
                    accumulate_into_main_grad: bool = False) -> Tensor:
    """kl_div of hidden states [N, H] through their heads [Vp, H]; `chunk_rows` and main_grad are left to the fused operator."""
    return kl_div(head(student_hidden, student_weight, tp_group), head(teacher_hidden, teacher_weight, tp_group),
                  objective=objective, beta=beta, alpha=alpha, temperature=temperature, weights=weights, valid_vocab=valid_vocab,
                  vocab_start=vocab_start, tp_group=tp_group)


def fused_linear_kd_loss(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None,
                         labels_N: Tensor, *, label_coef: float, distance_coef: float, weights: Tensor | None = None,
                         valid_vocab: int | None = None, vocab_start: int | None = None, tp_group: ProcessGroup | None = None,
                         **divergence) -> tuple[Tensor, Tensor, Tensor]:
    """(label_coef cross_entropy + distance_coef kl_div, and both): two losses of hidden states through their heads."""
    options = {"weights": weights, "valid_vocab": valid_vocab, "vocab_start": vocab_start, "tp_group": tp_group}
    label_N = fused_linear_cross_entropy(student_hidden, student_weight, labels_N, **options)
    distance_N = fused_linear_kl(student_hidden, student_weight, teacher_hidden, teacher_weight, **divergence, **options)
    return label_coef * label_N + distance_coef * distance_N, label_N.detach(), distance_N.detach()


def fused_linear_promptkd_loss(prompted_hidden: Tensor, teacher_weight: Tensor, base_hidden: Tensor | None,
                               student_hidden: Tensor, student_weight: Tensor, *, base_coef: float | Tensor,
                               temperature: float = 1.0, weights: Tensor | None = None, valid_vocab: int | None = None,
                               vocab_start: int | None = None, tp_group: ProcessGroup | None = None,
                               chunk_rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """promptkd_loss of hidden states; both heads are frozen, and the teacher and its base share one."""
    teacher_VH, student_VH = teacher_weight.detach(), student_weight.detach()
    base_NV = None if base_hidden is None else head(base_hidden.detach(), teacher_VH, tp_group)
    return promptkd_loss(head(prompted_hidden, teacher_VH, tp_group), head(student_hidden.detach(), student_VH, tp_group),
                         base_NV, base_coef=base_coef, temperature=temperature, weights=weights, valid_vocab=valid_vocab,
                         vocab_start=vocab_start, tp_group=tp_group)


def fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels_N: Tensor, *, weights: Tensor | None = None,
                               valid_vocab: int | None = None, vocab_start: int | None = None,
                               tp_group: ProcessGroup | None = None, chunk_rows: int | None = None,
                               accumulate_into_main_grad: bool = False) -> Tensor:
    """cross_entropy of hidden states through their head."""
    return cross_entropy(head(hidden, weight, tp_group), labels_N, weights=weights, valid_vocab=valid_vocab,
                         vocab_start=vocab_start, tp_group=tp_group)
