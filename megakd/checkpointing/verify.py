"""What was written is read back and compared with what it was made from, bit for bit, block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from megakd.checkpointing.blocks import Index, bits, blocks
from megakd.errors import UserError


class Tensors(Protocol):
    """Tensors by name: a Hugging Face folder, a native checkpoint, or a view of one."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""

    def read(self, name: str, index: Index) -> Tensor:
        """The rectangle `index`, a slice for each axis."""


def progress(total_bytes: int, what: str) -> tqdm:
    """A progress bar in bytes; quiet where nobody watches."""
    return tqdm(total=total_bytes, desc=what, unit="B", unit_scale=True, unit_divisor=1024, disable=None)


def _stored_bytes(tensors: Tensors, dtypes: dict[str, torch.dtype]) -> int:
    return sum(math.prod(tensors.shape(name)) * dtype.itemsize for name, dtype in dtypes.items())


def check_equal(written: Tensors, source: Tensors, dtypes: dict[str, torch.dtype]) -> None:
    """Compare the named tensors.

    Raises:
        UserError: one differs; a disk, or this program, is at fault.
    """
    with progress(_stored_bytes(source, dtypes), "verifying") as bar:
        for name, dtype in dtypes.items():
            if tuple(written.shape(name)) != tuple(source.shape(name)):
                raise UserError(
                    f"verification: {name} has shape {tuple(written.shape(name))}, its source {tuple(source.shape(name))}"
                )
            compare_blocks(name, _pairs(written, source, name, dtype), bar)


def _pairs(written: Tensors, source: Tensors, name: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for index in blocks(source.shape(name), dtype.itemsize):
        yield written.read(name, index), source.read(name, index)


def compare_blocks(name: str, blocks_of_both: Iterable[tuple[Tensor, Tensor]], bar: tqdm) -> None:
    """Compare pairs of blocks of one tensor, dtypes and all bits.

    Raises:
        UserError: a pair differs; `name` is the tensor's.
    """
    for ours, theirs in blocks_of_both:
        if ours.dtype != theirs.dtype or not torch.equal(bits(ours), bits(theirs)):
            raise UserError(f"verification: {name} differs from its source; nothing was written, try again and check the disk")
        bar.update(ours.nbytes)
