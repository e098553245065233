"""The autograd functions of every loss whose gradient is written out: forward makes the statistics, backward the gradient.

A `RowLoss` says what a row costs and what its gradient is; `LossFromLogits` here and `LossFromHidden` in `heads` carry
it out. Forward keeps the logits and a few numbers a row, nothing of the logits' size; backward writes one gradient a tensor, or
writes over the logits where it may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .row_chunks import accumulation_dtype
from .shards import VocabShard


@dataclass(frozen=True, kw_only=True)
class RowLoss:
    """A loss of each row of one or more [N, Vp] logits, padding cut off."""

    outputs: ClassVar[int] = 1  # the loss and its parts
    reads_once: ClassVar[bool] = False  # whether it has `at_once`, which the fused heads then call
    shard: VocabShard

    def of_rows(self, rows: slice | Tensor) -> RowLoss:
        """The same loss for some of the rows, where it holds something of each row (labels)."""
        return self

    def evaluate(self, logits_NV: list[Tensor], weights_N: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """(the loss and its parts, each [N] and without weights; what the gradient needs). The collectives are made here."""
        raise NotImplementedError

    def differentiate(self, logits_NV: list[Tensor], state: tuple[Tensor | None, ...], scale_N: Tensor,
                      grads_NV: list[Tensor | None]) -> None:
        """Write scale times the loss's gradient into the tensors given, which may be the logits themselves."""
        raise NotImplementedError

    def at_once(self, logits_NV: list[Tensor], scale_N: Tensor, grads_NV: list[Tensor | None]) -> tuple[Tensor, ...]:
        """What evaluate gives and what differentiate writes, without a collective."""
        raise NotImplementedError


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
        grads_NV = _gradients(logits_NV, ctx.needs_input_grad[3:], inplace)
        cut = loss.shard.cut(*logits_NV)
        loss.differentiate(cut, state, grad_N if weights_N is None else grad_N * weights_N, _real_columns(cut[0], grads_NV))
        return None, None, None, *grads_NV


def loss_from_logits(loss: RowLoss, weights_N: Tensor | None, inplace: bool, *logits_NV: Tensor) -> tuple[Tensor, ...]:
    """(loss_N, *parts_N) with gradient to the logits that require one."""
    return LossFromLogits.apply(loss, weights_N, inplace, *logits_NV)


def value_and_gradient(loss: RowLoss, logits_NV: Sequence[Tensor], grads_NV: Sequence[Tensor | None],
                       weights_N: Tensor | None) -> tuple[Tensor, ...]:
    """Loss and parts times the weights, each [N]; the loss's gradient goes into grads, which may be the logits."""
    cut = loss.shard.cut(*logits_NV)
    grads_NV = _real_columns(cut[0], grads_NV)
    if all(x is None for x in grads_NV):
        return weighted(loss.evaluate(cut, weights_N)[0], weights_N)
    scale_N = weights_N
    if scale_N is None:
        scale_N = cut[0].new_ones(len(cut[0]), dtype=accumulation_dtype(cut[0]))
    if loss.reads_once:
        outputs = loss.at_once(cut, scale_N, grads_NV)
    else:
        outputs, state = loss.evaluate(cut, weights_N)
        loss.differentiate(cut, state, scale_N, grads_NV)
    return weighted(outputs, weights_N)


def _gradients(logits_NV: Sequence[Tensor], wanted: Sequence[bool], inplace: bool) -> list[Tensor | None]:
    """Where each gradient goes: over the logits, or into memory of its own."""
    return [None if not w else x.detach() if inplace else torch.empty_like(x) for x, w in zip(logits_NV, wanted)]


def _real_columns(cut_NV: Tensor, grads_NV: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients' real columns; those of the padding become zero."""
    columns = cut_NV.shape[1]
    for grad_NV in grads_NV:
        if grad_NV is not None:
            grad_NV[:, columns:] = 0
    return [None if grad_NV is None else grad_NV[:, :columns] for grad_NV in grads_NV]


def weights_for(weights_N: Tensor | None, x: Tensor) -> Tensor | None:
    """The weights in the dtype that x's sums are made in, side by side: the kernels step from one to the next."""
    if weights_N is not None and weights_N.shape != x.shape[:1]:
        raise ValueError(f"weights has the shape {tuple(weights_N.shape)} for {len(x)} rows: give one number a row")
    return None if weights_N is None else weights_N.detach().to(accumulation_dtype(x)).contiguous()


def weighted(outputs: tuple[Tensor, ...], weights_N: Tensor | None) -> tuple[Tensor, ...]:
    """Each output times the weights, in memory of its own."""
    return tuple(x * (1.0 if weights_N is None else weights_N) for x in outputs)
