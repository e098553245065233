"""One autograd function for every loss whose gradient is written out: forward makes the statistics, backward the gradient.

A `RowLoss` says what a row costs and what its gradient is; `LossFromLogits` here and `LossFromHidden` in `fused_linear_kl` carry
it out. Forward keeps the logits and a few numbers a row, nothing of the logits' size; backward writes one gradient a tensor, or
writes over the logits where it may.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kl_rows import accumulation_dtype
from .shards import VocabShard


class RowLoss(Protocol):
    """A loss of each row of one or more [N, Vp] logits, padding cut off."""

    outputs: int  # the loss and its parts
    shard: VocabShard

    def of_rows(self, rows: slice | Tensor) -> RowLoss:
        """The same loss for some of the rows, where it holds something of each row (labels)."""

    def evaluate(self, logits_NV: list[Tensor], weights_N: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """(the loss and its parts, each [N] and without weights; what the gradient needs). The collectives are made here."""

    def differentiate(self, logits_NV: list[Tensor], state: tuple[Tensor | None, ...], scale_N: Tensor,
                      grads_NV: list[Tensor | None]) -> None:
        """Write scale times the loss's gradient into the tensors given, which may be the logits themselves."""


class LossFromLogits(torch.autograd.Function):
    """(loss_N, *parts_N) times the rows' weights; the parts carry no gradient."""

    @staticmethod
    def forward(ctx, loss: RowLoss, weights_N: Tensor | None, inplace: bool, *logits_NV: Tensor) -> tuple[Tensor, ...]:
        weights_N = weights_for(weights_N, logits_NV[0])
        outputs, state = loss.evaluate(loss.shard.cut(*logits_NV), weights_N)
        outputs = weighted(outputs, weights_N)
        ctx.save_for_backward(weights_N, *logits_NV, *state)
        ctx.settings = loss, inplace, len(logits_NV)
        ctx.spent = False
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor, *_parts):
        loss, inplace, n = ctx.settings
        if ctx.spent:
            raise RuntimeError("the first backward has written its gradient over the logits: pass inplace=False to repeat it")
        ctx.spent = inplace
        weights_N, *saved = ctx.saved_tensors
        logits_NV, state = saved[:n], tuple(saved[n:])
        grads_NV = [None if not wanted else x.detach() if inplace else torch.empty_like(x)
                    for x, wanted in zip(logits_NV, ctx.needs_input_grad[3:])]
        cut = loss.shard.cut(*logits_NV)
        columns = cut[0].shape[1]
        scale_N = grad_N if weights_N is None else grad_N * weights_N
        loss.differentiate(cut, state, scale_N, [None if g is None else g[:, :columns] for g in grads_NV])
        for grad_NV in grads_NV:
            if grad_NV is not None:
                grad_NV[:, columns:] = 0  # padding
        return None, None, None, *grads_NV


def weights_for(weights_N: Tensor | None, x: Tensor) -> Tensor | None:
    """The weights in the dtype that x's sums are made in, side by side: the kernels step from one to the next."""
    return None if weights_N is None else weights_N.detach().to(accumulation_dtype(x)).contiguous()


def weighted(outputs: tuple[Tensor, ...], weights_N: Tensor | None) -> tuple[Tensor, ...]:
    """Each output times the weights, in memory of its own."""
    return tuple(x * (1.0 if weights_N is None else weights_N) for x in outputs)
