"""How a Megatron parameter is made of Hugging Face tensors, and back: one table per family serves both directions.

A mapping sees the *full* Megatron parameter (as at TP 1) and can read any range of it along the axis that tensor parallelism cuts,
touching only the bytes it needs. The mapping knows the topology; the family's table does not.

    Replicated  every rank holds all of it (norms, position embeddings, biases of row-parallel layers)
    Sharded     rows (axis 0) or columns (axis 1) in even ranges
    Vocabulary  rows, padded with zeros to the padded vocabulary
    QKV         rows per key/value group: [the group's q heads | k | v]
    GatedMLP    [gate; up], each cut on its own and then joined on the rank
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Source(Protocol):
    """Hugging Face tensors by name; reads only what is asked for."""

    @property
    def files(self) -> set[Path]:
        """Those that hold them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, as Hugging Face stores it."""

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """The rectangle `index`, a slice for each axis, as Hugging Face stores it."""

    def place(self, name: str) -> str:
        """The file that holds it, for messages."""


@dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor, or the `part`-th of `parts` equal pieces of its output axis, in Megatron's [out, in] orientation."""

    name: str  # `*` stands for the layer number
    transposed: bool = False  # GPT-2's Conv1D stores [in, out]
    part: int = 0
    parts: int = 1
    skip_rows: int = 0  # OPT's position table begins with two rows that no position uses

    def at_layer(self, layer: int) -> HFTensor:
        """The same with `*` filled in."""
        return HFTensor(self.name.replace("*", str(layer)), self.transposed, self.part, self.parts, self.skip_rows)

    def shape(self, source: Source) -> tuple[int, ...]:
        """[out, in] of this piece, without the skipped rows."""
        shape = source.shape(self.name)
        shape = shape[::-1] if self.transposed else shape
        return (shape[0] // self.parts - self.skip_rows, *shape[1:])

    def read(self, source: Source, lo: int, hi: int, axis: int = 0) -> Tensor:
        """Rows (axis 0) or columns (axis 1) lo..hi."""
        rows, columns = (slice(lo, hi), slice(None)) if axis == 0 else (slice(0, self.shape(source)[0]), slice(lo, hi))
        offset = self.part * self.shape(source)[0] + self.skip_rows
        rows = slice(rows.start + offset, rows.stop + offset)
        if len(source.shape(self.name)) == 1:
            return source.read(self.name, (rows,))
        if self.transposed:
            return source.read(self.name, (columns, rows)).t()
        return source.read(self.name, (rows, columns))


Pieces = Iterator[tuple[HFTensor, Tensor]]


@dataclass(frozen=True)
class Mapping:
    """What all kinds share: `axis` is the axis that tensor parallelism cuts, None when every rank holds the whole."""

    axis: int | None = None

    def sources(self) -> tuple[HFTensor, ...]:
        """The Hugging Face tensors it is made of, in the order in which they lie in the parameter."""
        raise NotImplementedError

    @property
    def is_per_layer(self) -> bool:
        """Whether the table's entry stands for a parameter in every layer."""
        return "*" in self.sources()[0].name

    def shape(self, source: Source) -> tuple[int, ...]:
        """Shape of the full Megatron parameter."""
        raise NotImplementedError

    def read(self, source: Source, lo: int, hi: int) -> Tensor:
        """The range lo..hi of the full Megatron parameter along `axis` (axis 0 when it is not cut)."""
        raise NotImplementedError

    def to_hf(self, full: Tensor) -> Pieces:
        """The Hugging Face pieces of a full Megatron parameter."""
        raise NotImplementedError

    def ranges(self, size: int, tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
        """Ranges of the full parameter that one TP rank holds, in its order; `size` is the length of the cut axis."""
        if self.axis is None:
            return [(0, size)]
        step = size // tp_size
        return [(tp_rank * step, (tp_rank + 1) * step)]

    def read_shard(self, source: Source, tp_rank: int, tp_size: int) -> Tensor:
        """What one TP rank holds."""
        size = self.shape(source)[self.axis or 0]
        pieces = [self.read(source, lo, hi) for lo, hi in self.ranges(size, tp_rank, tp_size)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)


@dataclass(frozen=True, kw_only=True)
class Replicated(Mapping):
    """The same on every rank: norms, position embeddings, biases of row-parallel layers."""

    tensor: HFTensor

    def sources(self):
        return (self.tensor,)

    def shape(self, source):
        return self.tensor.shape(source)

    def read(self, source, lo, hi):
        return self.tensor.read(source, lo, hi)

    def to_hf(self, full):
        yield self.tensor, full


@dataclass(frozen=True, kw_only=True)
class Sharded(Replicated):
    """One even range of rows (axis 0) or columns (axis 1) a rank."""

    axis: int = 0

    def read(self, source, lo, hi):
        return self.tensor.read(source, lo, hi, self.axis)


@dataclass(frozen=True, kw_only=True)
class Vocabulary(Mapping):
    """Rows past the real vocabulary are zeros here and are dropped on the way back."""

    axis: int = 0
    tensor: HFTensor
    padded_size: int

    def sources(self):
        return (self.tensor,)

    def shape(self, source):
        return (self.padded_size, *self.tensor.shape(source)[1:])

    def read(self, source, lo, hi):
        real = self.tensor.shape(source)[0]
        rows = self.tensor.read(source, min(lo, real), min(hi, real))
        padding = hi - lo - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])]) if padding else rows

    def to_hf(self, full):
        yield self.tensor, full


@dataclass(frozen=True, kw_only=True)
class QKV(Mapping):
    """`groups` key/value heads; each Megatron group is [its q heads | k head | v head] along the rows."""

    axis: int = 0
    q: HFTensor
    k: HFTensor
    v: HFTensor
    groups: int
    heads_per_group: int = 1

    def sources(self):
        return self.q, self.k, self.v

    def shape(self, source):
        return (sum(part.shape(source)[0] for part in self.sources()), *self.q.shape(source)[1:])

    def read(self, source, lo, hi):
        """A TP rank may end inside a group (fewer groups than ranks): whole groups are read, then cut."""
        per_group = self.shape(source)[0] // self.groups
        first, last = lo // per_group, -(-hi // per_group)
        parts = [self._groups(part, source, first, last) for part in self.sources()]
        return torch.cat(parts, 1).flatten(0, 1)[lo - first * per_group : hi - first * per_group]

    def _groups(self, part: HFTensor, source: Source, first: int, last: int) -> Tensor:
        rows = part.shape(source)[0] // self.groups
        return part.read(source, first * rows, last * rows).unflatten(0, (last - first, rows))

    def to_hf(self, full):
        grouped = full.unflatten(0, (self.groups, -1))
        head = grouped.shape[1] // (self.heads_per_group + 2)
        for tensor, part in zip(self.sources(), grouped.split([grouped.shape[1] - 2 * head, head, head], 1)):
            yield tensor, part.flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class GatedMLP(Mapping):
    """[gate; up] along the rows, each cut on its own: a rank holds two ranges of the full parameter."""

    axis: int = 0
    gate: HFTensor
    up: HFTensor

    def sources(self):
        return self.gate, self.up

    def shape(self, source):
        rows, *rest = self.gate.shape(source)
        return (2 * rows, *rest)

    def read(self, source, lo, hi):
        half = self.gate.shape(source)[0]
        assert lo // half == (hi - 1) // half, "a range lies in the gate or in the up half"
        tensor, offset = (self.gate, 0) if lo < half else (self.up, half)
        return tensor.read(source, lo - offset, hi - offset)

    def ranges(self, size, tp_rank, tp_size):
        half = size // 2
        lo, hi = tp_rank * half // tp_size, (tp_rank + 1) * half // tp_size
        return [(lo, hi), (half + lo, half + hi)]

    def to_hf(self, full):
        yield from zip(self.sources(), full.chunk(2))


Table = dict[str, Mapping]  # Megatron parameter name, `*` for the layer number -> mapping
