"""Hidden states and output weights to loss and gradients, in chunks of rows: the logits of one chunk are all that ever exist.

    for each chunk:  z = h W^T of every model;   loss, and dz in place of z;   dh = dz W,   dW += dz^T h

The gradient is made in forward, while the chunk's logits are there, so before the upstream gradient is known. Backward scales it:
dh by each row's own upstream, dW by the one number that all rows must share (per-token `weights` are folded in before). A chunk
costs one read and write of the float32 dW, which is why chunks are 2,048 rows on a GPU. Where two models share a head, the loss
takes the difference of their logits from that of their hidden states: (h_t - h_b) W^T keeps the digits that t - b would lose.

N rows (tokens), H hidden size, Vp vocabulary columns of this rank. Hidden states are whole on every rank, and so are their
gradients; weights and their gradients are shards.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from .. import launch
from ..cross_entropy.loss import label_loss
from ..divergence import Objective
from ..divergence.kl_div import divergence
from ..from_logits import RowLoss, value_and_gradient, weights_for
from ..kd.loss import KDLoss
from ..kl.promptkd_loss import prompt_loss
from ..row_chunks import accumulation_dtype
from ..shards import VocabShard
from ..topk import TopKRows
from ..topk import reference as topk_reference
from ..topk.loss import topk_loss
from . import reference

CHUNK_ROWS, CPU_CHUNK_ROWS = 2048, 128  # by rows and not by memory: every rank must make as many chunks, whatever its width


class LossFromHidden(torch.autograd.Function):
    """(loss_N, *parts_N) from the hidden states and weights of each model; `wanted` says which tensors need a gradient."""

    @staticmethod
    def forward(ctx, loss: RowLoss, weights_N: Tensor | None, chunk_rows: int | None, into_main_grad: bool,
                wanted: tuple[bool, ...], *hidden_and_weight: Tensor) -> tuple[Tensor, ...]:
        hidden, weight = hidden_and_weight[::2], hidden_and_weight[1::2]
        weights_N = weights_for(weights_N, hidden[0])
        dh = [torch.zeros_like(h) if w else None for h, w in zip(hidden, wanted[::2])]
        dW = [torch.zeros_like(W, dtype=accumulation_dtype(W)) if w else None for W, w in zip(weight, wanted[1::2])]  # None: logits
        outputs_KN = torch.zeros(loss.outputs, len(hidden[0]), dtype=accumulation_dtype(hidden[0]), device=hidden[0].device)
        chunk_rows = chunk_rows or (CPU_CHUNK_ROWS if hidden[0].device.type == "cpu" else CHUNK_ROWS)
        buffers = [None if W is None else h.new_empty(min(chunk_rows, len(h)), len(W)) for h, W in zip(hidden, weight)]
        for rows in _chunks(hidden[0], weights_N, chunk_rows):
            inputs = [h[rows] for h in hidden]
            logits = [x if W is None else torch.mm(x, W.t(), out=z[: len(x)]) for x, W, z in zip(inputs, weight, buffers)]
            grads = [z if a is not None or b is not None else None for z, a, b in zip(logits, dh, dW)]
            weights_R = None if weights_N is None else weights_N[rows]
            outputs_KN[:, rows] = torch.stack(value_and_gradient(loss.of_rows(rows), logits, grads, weights_R))
            for i, dz in enumerate(grads):
                if dh[i] is not None:
                    dh[i][rows] = dz @ weight[i]
                if dW[i] is not None:
                    add_product(dW[i], dz, inputs[i])
        for gradient in dh:
            if gradient is not None:
                loss.shard.all_reduce(gradient)
        ctx.save_for_backward(weights_N, *dh, *dW)
        ctx.weight, ctx.into_main_grad = weight, into_main_grad
        outputs = tuple(x.clone() for x in outputs_KN)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor, *_parts):
        weights_N, *saved = ctx.saved_tensors
        dh, dW = saved[: len(ctx.weight)], saved[len(ctx.weight) :]
        upstream = _shared_upstream(grad_N, weights_N) if any(x is not None for x in dW) else None
        grads = []
        for i, W in enumerate(ctx.weight):
            grads.append(None if dh[i] is None else (dh[i] * grad_N[:, None]).to(dh[i].dtype))
            grads.append(None if dW[i] is None else _weight_gradient(W, dW[i], upstream, ctx.into_main_grad))
        return None, None, None, None, None, *grads


def _chunks(hidden_NH: Tensor, weights_N: Tensor | None, chunk_rows: int) -> Iterator[slice | Tensor]:
    """Slices of all rows; on a CPU only the rows that count (on a GPU the host would have to wait for their number)."""
    if weights_N is not None and hidden_NH.device.type == "cpu" and not bool((weights_N != 0).all()):
        return iter(weights_N.nonzero()[:, 0].split(chunk_rows))
    return (slice(i, i + chunk_rows) for i in range(0, len(hidden_NH), chunk_rows))


def add_product(dW: Tensor, dz: Tensor, x: Tensor) -> None:
    """dW += dz^T x, with the sum in dW's dtype."""
    if dW.dtype == dz.dtype:
        dW.addmm_(dz.t(), x)
    elif dW.is_cuda:
        torch.addmm(dW, dz.t(), x, out_dtype=dW.dtype, out=dW)
    else:
        dW.addmm_(dz.t().to(dW.dtype), x.to(dW.dtype))


def _shared_upstream(grad_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """The one upstream gradient of all rows that count. Where they differ, an error (on a GPU a late one, from the device)."""
    counts = torch.ones_like(grad_N, dtype=torch.bool) if weights_N is None else weights_N != 0
    if not len(grad_N):
        return grad_N.sum()
    high, low = grad_N.where(counts, -torch.inf).amax(), grad_N.where(counts, torch.inf).amin()
    message = ("a fused head makes its weight's gradient before it knows the gradient of the loss, which must therefore be one "
               "number for all rows: pass per-token factors as weights=, and take a plain sum or mean of the loss")
    if grad_N.is_cuda:
        torch._assert_async(high <= low, message)  # no row counts: -inf <= inf
    elif high > low:
        raise ValueError(message)
    return high.where(high == low, 0.0)


def _weight_gradient(W: Tensor, dW: Tensor, upstream: Tensor, into_main_grad: bool) -> Tensor | None:
    """dW times upstream in W's dtype, or added to W.main_grad as Megatron's own linear layers do."""
    if not into_main_grad:
        return torch.mul(dW, upstream, out=torch.empty_like(W))
    W.main_grad.addcmul_(dW.to(W.main_grad.dtype), upstream.to(W.main_grad.dtype))
    if not hasattr(W, "grad_added_to_main_grad"):
        return None
    W.grad_added_to_main_grad = True
    if getattr(W, "zero_out_wgrad", False):
        return None  # the word embedding, which W is too, brings the gradient that Megatron's hook adds
    return torch.empty_like(W)  # Megatron's data-parallel hook wants a gradient to fire, and then ignores it


def _apply(loss: RowLoss, weights: Tensor | None, chunk_rows: int | None, into_main_grad: bool, *hidden_and_weight: Tensor | None):
    hidden, weight = hidden_and_weight[::2], hidden_and_weight[1::2]
    hidden = [h.detach() if W is None else h for h, W in zip(hidden, weight)]  # logits are constants
    hidden_and_weight = tuple(x for pair in zip(hidden, weight) for x in pair)
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in hidden_and_weight)
    for W, w in zip(weight, wanted[1::2]):
        if into_main_grad and w and not hasattr(W, "main_grad"):
            raise ValueError("accumulate_into_main_grad=True needs weight.main_grad: wrap the model in Megatron's "
                             "DistributedDataParallel, or leave the gradient to autograd")
    return LossFromHidden.apply(loss, weights, chunk_rows, into_main_grad, wanted, *hidden_and_weight)


def fused_linear_kl(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None, *,
                    objective: Objective = "reverse_kl", beta: float = 0.5, alpha: float = 0.1, temperature: float = 1.0,
                    weights: Tensor | None = None, valid_vocab: int | None = None, vocab_start: int | None = None,
                    tp_group: ProcessGroup | None = None, chunk_rows: int | None = None,
                    accumulate_into_main_grad: bool = False) -> Tensor:
    """[N] float32 divergence from hidden states [N, H] and heads [Vp, H] of both models, times each row's weight. A teacher without
    a head is given by its logits [N, Vp], and has no gradient.

    Gradient to whichever of the four requires it: whole for hidden states, this shard's for weights (into weight.main_grad where
    `accumulate_into_main_grad`). With a weight's gradient the rows must share one upstream gradient; ValueError otherwise.
    The other options are those of `kl_div`.
    """
    if launch.implementation(student_hidden) == "reference":
        return reference.fused_linear_kl(student_hidden, student_weight, teacher_hidden, teacher_weight, objective=objective,
                                         beta=beta, alpha=alpha, temperature=temperature, weights=weights,
                                         valid_vocab=valid_vocab, vocab_start=vocab_start, tp_group=tp_group)
    loss = divergence(student_hidden, objective, beta, alpha, temperature, VocabShard(valid_vocab, vocab_start, tp_group))
    return _apply(loss, weights, chunk_rows, accumulate_into_main_grad, student_hidden, student_weight, teacher_hidden,
                  teacher_weight)[0]


def fused_linear_kd_loss(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor | None,
                         labels_N: Tensor, *, label_coef: float, distance_coef: float, objective: Objective = "forward_kl",
                         beta: float = 0.5, alpha: float = 0.1, temperature: float = 1.0, weights: Tensor | None = None,
                         valid_vocab: int | None = None, vocab_start: int | None = None, tp_group: ProcessGroup | None = None,
                         chunk_rows: int | None = None, accumulate_into_main_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_N, label_N, distance_N): label_coef cross_entropy + distance_coef kl_div, and its parts to be logged, from one product with
    the student's head, whose labels these are. The temperature is the divergence's alone.

    Gradient of the loss as in `fused_linear_kl`, which has the options.
    """
    if launch.implementation(student_hidden) == "reference":
        return reference.fused_linear_kd_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels_N,
                                              label_coef=label_coef, distance_coef=distance_coef, objective=objective, beta=beta,
                                              alpha=alpha, temperature=temperature, weights=weights, valid_vocab=valid_vocab,
                                              vocab_start=vocab_start, tp_group=tp_group)
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    loss = KDLoss(labels=label_loss(student_hidden, labels_N, len(student_weight), shard), label_coef=label_coef, shard=shard,
                  distance=divergence(student_hidden, objective, beta, alpha, temperature, shard), distance_coef=distance_coef)
    return _apply(loss, weights, chunk_rows, accumulate_into_main_grad, student_hidden, student_weight, teacher_hidden, teacher_weight)


def fused_linear_promptkd_loss(prompted_hidden: Tensor, teacher_weight: Tensor, base_hidden: Tensor | None,
                               student_hidden: Tensor, student_weight: Tensor, *, base_coef: float | Tensor,
                               temperature: float = 1.0, weights: Tensor | None = None, valid_vocab: int | None = None,
                               vocab_start: int | None = None, tp_group: ProcessGroup | None = None,
                               chunk_rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_N, kd_N, base_N) of `promptkd_loss` from hidden states [N, H]; gradient to prompted_hidden, any upstream gradient.

    Both heads are frozen. The teacher and its base share one, so that the base enters as a difference of hidden states.
    """
    if launch.implementation(prompted_hidden) == "reference":
        return reference.fused_linear_promptkd_loss(prompted_hidden, teacher_weight, base_hidden, student_hidden, student_weight,
                                                    base_coef=base_coef, temperature=temperature, weights=weights,
                                                    valid_vocab=valid_vocab, vocab_start=vocab_start, tp_group=tp_group)
    loss = prompt_loss(prompted_hidden, base_coef, True, temperature, VocabShard(valid_vocab, vocab_start, tp_group))
    teacher_VH, student_VH = teacher_weight.detach(), student_weight.detach()
    base = () if base_hidden is None else ((prompted_hidden - base_hidden).detach(), teacher_VH)
    return _apply(loss, weights, chunk_rows, False, prompted_hidden, teacher_VH, student_hidden.detach(), student_VH, *base)


def fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels_N: Tensor, *, weights: Tensor | None = None,
                               valid_vocab: int | None = None, vocab_start: int | None = None,
                               tp_group: ProcessGroup | None = None, chunk_rows: int | None = None,
                               accumulate_into_main_grad: bool = False) -> Tensor:
    """[N] float32 `cross_entropy` from hidden states [N, H] and a head [Vp, H]; options as in `fused_linear_kl`."""
    if launch.implementation(hidden) == "reference":
        return reference.fused_linear_cross_entropy(hidden, weight, labels_N, weights=weights, valid_vocab=valid_vocab,
                                                    vocab_start=vocab_start, tp_group=tp_group)
    loss = label_loss(hidden, labels_N, len(weight), VocabShard(valid_vocab, vocab_start, tp_group))
    return _apply(loss, weights, chunk_rows, accumulate_into_main_grad, hidden, weight)[0]


def fused_linear_topk_kl(hidden: Tensor, weight: Tensor, rows: TopKRows, **options) -> Tensor:
    """The first of `fused_linear_topk_kl_with_bias`, which has the options."""
    return fused_linear_topk_kl_with_bias(hidden, weight, rows, **options)[0]


def fused_linear_topk_kl_with_bias(hidden: Tensor, weight: Tensor, rows: TopKRows, *, objective: Objective = "forward_kl",
                                   beta: float = 0.5, alpha: float = 0.1, temperature: float = 1.0, weights: Tensor | None = None,
                                   valid_vocab: int | None = None, vocab_start: int | None = None,
                                   tp_group: ProcessGroup | None = None, chunk_rows: int | None = None,
                                   accumulate_into_main_grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence, forward bias, reverse bias), each [N] float32: of a student's hidden states [N, H] through its head from a truncated
    teacher, as `topk` defines them.

    Gradient of the first to the student. The other options are those of `fused_linear_kl`. ValueError for rows that are not what they say.
    """
    if launch.implementation(hidden) == "reference":
        return topk_reference.fused_linear_topk_kl_with_bias(
            hidden, weight, rows, objective=objective, beta=beta, alpha=alpha, temperature=temperature, weights=weights,
            valid_vocab=valid_vocab, vocab_start=vocab_start, tp_group=tp_group)
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    loss = topk_loss(hidden, rows, objective, beta, alpha, temperature, shard, width=len(weight))
    return _apply(loss, weights, chunk_rows, accumulate_into_main_grad, hidden, weight)


def fused_linear_topk_kd_loss(hidden: Tensor, weight: Tensor, rows: TopKRows, labels_N: Tensor, *, label_coef: float,
                              distance_coef: float, objective: Objective = "forward_kl", beta: float = 0.5, alpha: float = 0.1,
                              temperature: float = 1.0, weights: Tensor | None = None, valid_vocab: int | None = None,
                              vocab_start: int | None = None, tp_group: ProcessGroup | None = None, chunk_rows: int | None = None,
                              accumulate_into_main_grad: bool = False) -> tuple[Tensor, ...]:
    """(loss_N, label_N, distance_N, forward bias, reverse bias): `fused_linear_kd_loss` with a truncated teacher, as
    `fused_linear_topk_kl_with_bias` takes it."""
    if launch.implementation(hidden) == "reference":
        return topk_reference.fused_linear_topk_kd_loss(
            hidden, weight, rows, labels_N, label_coef=label_coef, distance_coef=distance_coef, objective=objective, beta=beta,
            alpha=alpha, temperature=temperature, weights=weights, valid_vocab=valid_vocab, vocab_start=vocab_start, tp_group=tp_group)
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    distance = topk_loss(hidden, rows, objective, beta, alpha, temperature, shard, width=len(weight))
    loss = KDLoss(labels=label_loss(hidden, labels_N, len(weight), shard), label_coef=label_coef, distance=distance,
                  distance_coef=distance_coef, shard=shard)
    return _apply(loss, weights, chunk_rows, accumulate_into_main_grad, hidden, weight)
