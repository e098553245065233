"""Tensors travel in pieces of bounded size, so that a conversion needs the same memory whatever the model's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 4 * 2**20

Index = tuple[slice, ...]


def blocks(shape: tuple[int, ...], itemsize: int) -> Iterator[Index]:
    """Indices that tile `shape` in row-major order, each at most BLOCK_BYTES (or one row of the last axis)."""
    row = math.prod(shape[1:]) * itemsize
    if shape[0] * row <= BLOCK_BYTES:
        yield tuple(slice(0, size) for size in shape)
    elif row > BLOCK_BYTES:
        for i in range(shape[0]):
            for rest in blocks(shape[1:], itemsize):
                yield (slice(i, i + 1), *rest)
    else:
        for lo, hi in split(0, shape[0], row):
            yield (slice(lo, hi), *(slice(0, size) for size in shape[1:]))


def split(lo: int, hi: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Pieces of lo..hi, each at most BLOCK_BYTES (or one row)."""
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(lo, hi, step):
        yield start, min(start + step, hi)


def row_pieces(index: Index, row_bytes: int) -> Iterator[Index]:
    """`index` cut along its rows: a few columns of a mapped tensor touch the pages of whole rows, and those are memory too."""
    if len(index) < 2:
        yield index
        return
    *outer, rows, columns = index
    for lo, hi in split(rows.start, rows.stop, row_bytes):
        yield (*outer, slice(lo, hi), columns)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat: equal bits and nothing less, NaNs and signed zeros too."""
    return tensor.contiguous().flatten().view(torch.uint8)
