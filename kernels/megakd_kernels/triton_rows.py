"""How a Triton program walks a row of logits; the operators' kernels and their launches share it.

A program walks one row, or one of its splits, in tiles. Rows of an odd width (V = 50257) start at any address: the first numbers
are peeled off up to a 16-byte boundary, and all other loads are 128 bits wide. Only the first and the last tile are masked.

Numbers that change from one micro-batch to the next (rows, lengths) are not specialised: Triton would compile a kernel anew for one
row, and for multiples of 16.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shards import FLOOR

LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))
NEG = tl.constexpr(FLOOR)
PROGRAMS = 8  # of a launch on a multiprocessor: as many as fit at once or more, whatever the kernel and the card (docs/kernels.md)
MULTIPROCESSORS = 132  # of an H200; where there is no device to ask


@triton.jit
def load_columns(ptr, offs, lo, hi, MASKED: tl.constexpr):
    """float32; where MASKED, columns outside lo..hi are -inf and not read."""
    if MASKED:
        return tl.load(ptr + offs, mask=(offs >= lo) & (offs < hi), other=float("-inf")).to(tl.float32)
    else:
        return tl.load(ptr + offs).to(tl.float32)


@triton.jit
def store_columns(ptr, offs, value, lo, hi, MASKED: tl.constexpr):
    """Rounded to the tensor's type; where MASKED, columns outside lo..hi stay as they are."""
    if MASKED:
        tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=(offs >= lo) & (offs < hi))
    else:
        tl.store(ptr + offs, value.to(ptr.dtype.element_ty))


@triton.jit
def row_start(ptr, row, stride, ALIGNED: tl.constexpr):
    """The row's address, moved back to a 16-byte boundary where ALIGNED."""
    offset = row.to(tl.int64) * stride
    if ALIGNED:
        offset = tl.multiple_of((offset // 8) * 8, 8)
    return ptr + offset


@triton.jit
def slice_bounds(row, stride, split, columns, split_columns, ALIGNED: tl.constexpr):
    """(start, first, end) of a split: it reads tiles from start, of which numbers before first belong to another row."""
    head = 0
    if ALIGNED:
        head = ((row.to(tl.int64) * stride) % 8).to(tl.int32)
    start = split * split_columns
    return start, tl.maximum(start, head), tl.minimum(start + split_columns, columns + head)


@triton.jit
def clear(grad_a, grad_b, start, lo, hi, WANT_A: tl.constexpr, WANT_B: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in columns lo..hi of the gradients that are wanted."""
    for tile in range(start, hi, BLOCK):
        offs = tl.multiple_of(tile, 8) + tl.arange(0, BLOCK)
        if WANT_A:
            store_columns(grad_a, offs, tl.zeros((BLOCK,), tl.float32), lo, hi, True)
        if WANT_B:
            store_columns(grad_b, offs, tl.zeros((BLOCK,), tl.float32), lo, hi, True)


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Where x's kernels are launched. Triton launches on the current device, which need not be the one that holds the tensors:
    without this, the kernel would get addresses of another GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def aligned(*tensors_NV: Tensor | None) -> bool:
    """Whether all rows of the same index start at the same place between two 16-byte boundaries."""
    given = [x for x in tensors_NV if x is not None]
    if any(x.stride(1) != 1 for x in given if x.shape[1] > 1):
        raise ValueError("the logits of one row must lie side by side in memory: pass logits.contiguous()")
    return len({x.stride(0) % 8 for x in given}) == 1 and all(x.data_ptr() % 16 == 0 for x in given)


def warps(of_32: int) -> int:
    """As many threads in the device's own warps, which AMD makes of 64: more threads a tile would leave each with less than 128 bits."""
    return of_32 // 2 if torch.version.hip else of_32


def programs_wanted(x: Tensor) -> int:
    """Programs that fill x's device; fewer rows than that are split over the vocabulary."""
    return PROGRAMS * (torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else MULTIPROCESSORS)


def split_over(x_NV: Tensor, tile: int) -> tuple[int, int]:
    """(splits, columns a split). The number of splits depends on the rows and the device only: ranks with other widths, on cards of one
    kind, make as many."""
    rows, columns = x_NV.shape
    splits = min(16, max(1, triton.cdiv(programs_wanted(x_NV), max(1, rows))))
    return splits, max(1, triton.cdiv(triton.cdiv(columns + 7, splits), tile)) * tile
