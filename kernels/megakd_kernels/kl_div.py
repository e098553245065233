"""Divergence per token between a student and a teacher, from vocabulary shards of their logits.

    reverse_kl  KL(q || p)        forward_kl  KL(p || q)        q = softmax(student / T), p = softmax(teacher / T), no factor T^2
    jsd, skew_forward_kl, skew_reverse_kl, tvd: as in `reference`; the gradients of all are in `kl_rows`

Forward reads the logits once and keeps nothing but them and three numbers a row; one all-gather (mixtures: and one all-reduce)
makes the shards one. Backward reads them again and writes the gradient, over the logits themselves when `inplace`.
A column where the first distribution has mass and the second has none makes a KL infinite: it comes out beyond 1e25, never NaN.

N rows (tokens), Vp columns on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import launch, reference
from .kl_rows import Merged, accumulation_dtype, mixture_loss
from .reference import check_objective
from .shards import VocabShard


class _KLDiv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_NV: Tensor, teacher_NV: Tensor, objective: str, share: float, temperature: float,
                weights_N: Tensor | None, shard: VocabShard, inplace: bool) -> Tensor:
        kernels = launch.kernels(student_NV, "kl")
        weights_N = weights_for(weights_N, student_NV)
        s_NV, t_NV = shard.cut(student_NV, teacher_NV)
        a_NV, b_NV = (t_NV, s_NV) if objective == "forward_kl" else (s_NV, t_NV)
        options = {"weights": weights_N, "temperature": temperature}
        merged, sums_2N = kernels.merge(shard.all_gather(kernels.statistics(a_NV, b_NV, **options))), None
        loss_N = merged.kl_ab
        if not objective.endswith("_kl") or objective.startswith("skew"):
            sums_2N = shard.all_reduce(kernels.mixture_sums(a_NV, b_NV, merged, objective=objective, share=share, **options))
            loss_N = mixture_loss(sums_2N, objective=objective, share=share)
        ctx.save_for_backward(student_NV, teacher_NV, weights_N, sums_2N, *merged)
        ctx.settings = kernels, objective, share, temperature, shard, inplace
        ctx.spent = False
        return loss_N if weights_N is None else loss_N * weights_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):
        check_unspent(ctx)
        kernels, objective, share, temperature, shard, inplace = ctx.settings
        student_NV, teacher_NV, weights_N, sums_2N, *merged = ctx.saved_tensors
        scale_N = grad_N / temperature if weights_N is None else grad_N * weights_N / temperature
        grads = [gradient_like(x, inplace) if wanted else None
                 for x, wanted in zip((student_NV, teacher_NV), ctx.needs_input_grad)]
        s_NV, t_NV = shard.cut(student_NV, teacher_NV)
        ds, dt = (grad if grad is None else grad[:, : s_NV.shape[1]] for grad in grads)
        if sums_2N is not None:
            kernels.mixture_gradient(s_NV, t_NV, Merged(*merged), sums_2N, scale_N, objective=objective, share=share,
                                     temperature=temperature, grad_q=ds, grad_p=dt)
        elif objective == "reverse_kl":
            kernels.gradient(s_NV, t_NV, None, Merged(*merged), scale_N, temperature=temperature, grad_a=ds, grad_b=dt)
        else:
            kernels.gradient(t_NV, s_NV, None, Merged(*merged), scale_N, temperature=temperature, grad_a=dt, grad_b=ds)
        for grad in grads:
            clear_padding(grad, s_NV.shape[1])
        return *grads, None, None, None, None, None, None


def check_unspent(ctx) -> None:
    """An in-place gradient leaves no logits for a second backward."""
    if ctx.spent:
        raise RuntimeError("the first backward has written its gradient over the logits: pass inplace=False to repeat it")
    ctx.spent = ctx.settings[-1]


def weights_for(weights_N: Tensor | None, logits_NV: Tensor) -> Tensor | None:
    return None if weights_N is None else weights_N.detach().to(accumulation_dtype(logits_NV))


def gradient_like(logits_NV: Tensor, inplace: bool) -> Tensor:
    return logits_NV.detach() if inplace else torch.empty_like(logits_NV)


def clear_padding(grad_NV: Tensor | None, columns: int) -> None:
    if grad_NV is not None and columns < grad_NV.shape[1]:
        grad_NV[:, columns:] = 0


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
    check_objective(objective, beta, alpha, temperature)
    return _KLDiv.apply(student_logits, teacher_logits, objective, beta if objective == "jsd" else alpha, temperature, weights,
                        VocabShard(valid_vocab, vocab_start, tp_group), inplace)
