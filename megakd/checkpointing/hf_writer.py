"""Write safetensors files as a stream: header first, then every tensor block by block, over as many shards as it takes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megakd.models.hf_checkpoint import INDEX, NAMES, SINGLE

HEADER_LENGTH = struct.Struct("<Q")  # a safetensors file: u64 header length, JSON header, data


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its data alone; the header is not counted."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_weights(
    folder: Path, plans: list[TensorPlan], blocks: Callable[[TensorPlan], Iterable[Tensor]], *, max_shard_size: int
) -> list[Path]:
    """model.safetensors, or shards and their index; `blocks` yields a tensor's data in row-major order, [..., rows, ...].

    Returns the weight files.
    """
    shards = split_into_shards(plans, max_shard_size)
    files = [folder / _shard_name(i, len(shards)) for i in range(len(shards))]
    for file, shard in zip(files, shards):
        write_file(file, shard, blocks)
    if len(files) > 1:
        _write_index(folder, files, shards)
    return files


def split_into_shards(plans: list[TensorPlan], max_shard_size: int) -> list[list[TensorPlan]]:
    """In order; a tensor larger than a shard has one of its own."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.nbytes
    return shards


def _shard_name(i: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def write_file(file: Path, plans: list[TensorPlan], blocks: Callable[[TensorPlan], Iterable[Tensor]]) -> None:
    """One safetensors file; wide dtypes come first, so that every tensor is aligned."""
    plans = sorted(plans, key=lambda plan: (-plan.dtype.itemsize, plan.name))
    with file.open("wb") as stream:
        stream.write(header(plans))
        for plan in plans:
            start = stream.tell()
            for block in blocks(plan):
                stream.write(memoryview(block.contiguous().flatten().view(torch.uint8).numpy()))
            assert stream.tell() - start == plan.nbytes, f"{plan.name}: blocks do not add up to {plan.shape}"


def header(plans: list[TensorPlan]) -> bytes:
    """u64 length, then JSON padded with blanks to a multiple of 8."""
    entries: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for plan in plans:
        entries[plan.name] = {"dtype": NAMES[plan.dtype], "shape": plan.shape, "data_offsets": [start, start + plan.nbytes]}
        start += plan.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return HEADER_LENGTH.pack(len(text)) + text


def _write_index(folder: Path, files: list[Path], shards: list[list[TensorPlan]]) -> None:
    plans = [plan for shard in shards for plan in shard]
    total = {"total_parameters": sum(math.prod(plan.shape) for plan in plans), "total_size": sum(plan.nbytes for plan in plans)}
    weight_map = {plan.name: file.name for file, shard in zip(files, shards) for plan in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n")
