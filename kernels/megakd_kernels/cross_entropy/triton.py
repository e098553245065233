"""Cross-entropy statistics and gradient on a GPU. The mathematics are in `loss`, the walk over a row in `triton_rows`.

N rows, V columns here, P partial statistics. `labels` count from this shard's first column; another rank's label is out of range.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_rows import (
    NEG,
    aligned,
    clear,
    load_columns,
    on_device_of,
    row_start,
    slice_bounds,
    split_over,
    store_columns,
    warps,
)

BLOCK, WARPS = 4096, 8
_LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _label_column(labels_ptr, row, stride, ALIGNED: tl.constexpr):
    """Where the row, moved back to a 16-byte boundary, holds its label; -1 for a negative label."""
    label = tl.load(labels_ptr + row)
    column = label
    if ALIGNED:
        column += (row.to(tl.int64) * stride) % 8
    return tl.where(label < 0, -1, column)


@triton.jit(do_not_specialize=["rows"])
def label_statistics_kernel(
    logits_ptr,     # [N, V] any float type
    labels_ptr,     # [N] int64
    weights_ptr,    # [N] float32; a row of weight 0 is not read
    out_ptr,        # [P, 3, N] float32, nats: maximum, sum of exponentials, the label's logit less the maximum or NEG
    stride, rows, columns, split_columns,
    HAS_WEIGHTS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    out = out_ptr + split.to(tl.int64) * 3 * rows + row
    if HAS_WEIGHTS:  # noqa: SIM102, an `and` would load the weight in either case
        if tl.load(weights_ptr + row) == 0.0:
            tl.store(out, 0.0)
            tl.store(out + rows, 1.0)
            tl.store(out + 2 * rows, 0.0)
            return
    logits = row_start(logits_ptr, row, stride, ALIGNED)
    start, lo, hi = slice_bounds(row, stride, split, columns, split_columns, ALIGNED)
    top = tl.full((BLOCK,), NEG, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for tile in range(start, hi, BLOCK):
        offs = tl.multiple_of(tile, 8) + tl.arange(0, BLOCK)
        if (tile >= lo) & (tile + BLOCK <= hi):  # noqa: SIM108, Triton has no conditional expression
            x = load_columns(logits, offs, lo, hi, False)
        else:
            x = load_columns(logits, offs, lo, hi, True)
        new_top = tl.maximum(top, x)
        total = total * tl.exp2((top - new_top) * _LOG2E) + tl.exp2((x - new_top) * _LOG2E)
        top = new_top
    row_top = tl.max(top, 0)
    column = _label_column(labels_ptr, row, stride, ALIGNED)
    logit = tl.load(logits + column, mask=(column >= lo) & (column < hi), other=float("-inf")).to(tl.float32)
    tl.store(out, row_top)
    tl.store(out + rows, tl.sum(total * tl.exp2((top - row_top) * _LOG2E), 0))
    tl.store(out + 2 * rows, tl.maximum(logit - row_top, NEG))


@triton.jit
def _label_gradient_tile(logits, grad, offs, lo, hi, top, scale_p, column, scale, MASKED: tl.constexpr):
    e = tl.exp2((load_columns(logits, offs, lo, hi, MASKED) - top) * _LOG2E)
    store_columns(grad, offs, e * scale_p - tl.where(offs == column, scale, 0.0), lo, hi, MASKED)


@triton.jit
def label_gradient_kernel(
    logits_ptr, labels_ptr,    # as above
    top_ptr, sum_ptr,          # [N] float32, nats, of the whole vocabulary: maximum, sum of exponentials less it
    scale_ptr,                 # [N] float32; a row of scale 0 is not read and gets zeros
    grad_ptr,                  # [N, V]; may be the logits themselves
    stride, stride_grad, columns, split_columns, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits = row_start(logits_ptr, row, stride, ALIGNED)
    grad = row_start(grad_ptr, row, stride_grad, ALIGNED)
    start, lo, hi = slice_bounds(row, stride, tl.program_id(1), columns, split_columns, ALIGNED)
    scale = tl.load(scale_ptr + row)
    top = tl.load(top_ptr + row)
    scale_p = scale / tl.load(sum_ptr + row)
    column = _label_column(labels_ptr, row, stride, ALIGNED)
    if scale == 0.0:
        clear(grad, grad, start, lo, hi, True, False, BLOCK)
        return
    for tile in range(start, hi, BLOCK):
        offs = tl.multiple_of(tile, 8) + tl.arange(0, BLOCK)
        if (tile >= lo) & (tile + BLOCK <= hi):
            _label_gradient_tile(logits, grad, offs, lo, hi, top, scale_p, column, scale, False)
        else:
            _label_gradient_tile(logits, grad, offs, lo, hi, top, scale_p, column, scale, True)


def statistics(logits_NV: Tensor, labels_N: Tensor, weights: Tensor | None) -> Tensor:
    """[P, 3, N] statistics of this shard's splits; see `rows.statistics`."""
    return _statistics_op(logits_NV, labels_N, weights)


@torch.library.custom_op("megakd_kernels::label_statistics", mutates_args=())
def _statistics_op(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    rows, columns = logits.shape
    splits, split_columns = split_over(logits, BLOCK)
    out = logits.new_empty(splits, 3, rows, dtype=torch.float32)
    with on_device_of(logits):
        label_statistics_kernel[(rows, splits)](
            logits, labels, out if weights is None else weights, out, logits.stride(0), rows, columns, split_columns,
            HAS_WEIGHTS=weights is not None, ALIGNED=aligned(logits), BLOCK=BLOCK, num_warps=warps(WARPS))
    return out


@_statistics_op.register_fake
def _(logits, labels, weights):
    splits, _ = split_over(logits, 1)
    return logits.new_empty(splits, 3, logits.shape[0], dtype=torch.float32)


def gradient(logits_NV: Tensor, labels_N: Tensor, top_N: Tensor, sum_N: Tensor, scale_N: Tensor, grad_NV: Tensor) -> None:
    """Write scale (softmax - one-hot) into grad_NV; see `rows.gradient`."""
    _gradient_op(logits_NV, labels_N, top_N, sum_N, scale_N.float().contiguous(), grad_NV)


@torch.library.custom_op("megakd_kernels::label_gradient", mutates_args=("grad",))
def _gradient_op(logits: Tensor, labels: Tensor, top: Tensor, total: Tensor, scale: Tensor, grad: Tensor) -> None:
    rows, columns = logits.shape
    splits, split_columns = split_over(logits, BLOCK)
    with on_device_of(logits):
        label_gradient_kernel[(rows, splits)](
            logits, labels, top, total, scale, grad, logits.stride(0), grad.stride(0), columns, split_columns,
            ALIGNED=aligned(logits, grad), BLOCK=BLOCK, num_warps=warps(WARPS))


@_gradient_op.register_fake
def _(*args):
    return None
