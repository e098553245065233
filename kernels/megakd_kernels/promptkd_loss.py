"""The loss of PromptKD's soft prompt, from vocabulary shards of three models' logits, with gradient to one of them.

    kd = KL(t || s),  base = KL(t || b),  loss = kd + c base       t prompted teacher, s student, b teacher without the prompt
    d loss / dt = p_t (log p_t - log p_s - kd + c (log p_t - log p_b - base)) / T

One pass over three tensors makes the statistics (8 floats a row, one all-gather), a second the gradient; c is read at run time.
b comes as logits or, where the head is shared, as the difference d = t - b: bfloat16 logits of two close models agree in most of
their bits, so that their difference keeps few (gradient error 27 % at KL 0.004); d itself rounded to bfloat16 keeps 1.5 %.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import launch, reference
from .kl_div import check_unspent, clear_padding, gradient_like, weights_for
from .kl_rows import Merged
from .reference import check_objective
from .shards import VocabShard


class _PromptKDLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prompted_NV: Tensor, student_NV: Tensor, third_NV: Tensor | None, difference: bool, coef: float | Tensor,
                temperature: float, weights_N: Tensor | None, shard: VocabShard,
                inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
        kernels = launch.kernels(prompted_NV, "kl")
        weights_N = weights_for(weights_N, prompted_NV)
        tensors_NV = [x for x in (prompted_NV, student_NV, third_NV) if x is not None]
        stats_PKN = kernels.statistics(*shard.cut(*tensors_NV), weights=weights_N, temperature=temperature, difference=difference)
        merged = kernels.merge(shard.all_gather(stats_PKN))
        kd_N = merged.kl_ab.clone()
        base_N = torch.zeros_like(kd_N) if third_NV is None else merged.kl_ac.clone()
        if weights_N is not None:
            kd_N, base_N = kd_N * weights_N, base_N * weights_N
        ctx.save_for_backward(prompted_NV, student_NV, third_NV, weights_N, *merged)
        ctx.settings = kernels, difference, coef, temperature, shard, inplace
        ctx.spent = False
        ctx.mark_non_differentiable(kd_N, base_N)
        return kd_N + coef * base_N, kd_N, base_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor, _kd, _base):
        check_unspent(ctx)
        kernels, difference, coef, temperature, shard, inplace = ctx.settings
        prompted_NV, student_NV, third_NV, weights_N, *merged = ctx.saved_tensors
        scale_N = grad_N / temperature if weights_N is None else grad_N * weights_N / temperature
        grad_NV = gradient_like(prompted_NV, inplace)
        t_NV, s_NV, *third = shard.cut(*(x for x in (prompted_NV, student_NV, third_NV) if x is not None))
        kernels.gradient(t_NV, s_NV, third[0] if third else None, Merged(*merged), scale_N, temperature=temperature, coef=coef,
                         difference=difference, grad_a=grad_NV[:, : t_NV.shape[1]])
        clear_padding(grad_NV, t_NV.shape[1])
        return grad_NV, None, None, None, None, None, None, None, None


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
    check_objective("reverse_kl", 0.5, 0.5, temperature)
    third_NV = base_delta if base_delta is not None else base_logits
    return _PromptKDLoss.apply(prompted_logits, student_logits.detach(), None if third_NV is None else third_NV.detach(),
                               base_delta is not None, base_coef, temperature, weights,
                               VocabShard(valid_vocab, vocab_start, tp_group), inplace)
