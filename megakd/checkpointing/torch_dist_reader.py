"""Read any rectangle of any tensor of a torch_dist folder, straight from the mapped files: no pickle, no copy of a whole chunk.

A chunk is stored as the zip file that torch.save writes. Its one tensor lies there uncompressed and contiguous, so its bytes are
found through the zip directory; shape and dtype stand in the index.
"""

from __future__ import annotations

import math
import mmap
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megakd.checkpointing.blocks import Index, row_pieces
from megakd.checkpointing.safe_metadata import read_metadata
from megakd.errors import UserError
from megakd.model_files import check_inside

TENSOR_DATA = "data/0"  # the name of the first storage in torch.save's zip file


@dataclass(frozen=True)
class StoredChunk:
    """A rectangle of a tensor: where it lies in the tensor, and where in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    start: int
    length: int

    def overlap(self, index: Index) -> Index | None:
        """The part of `index` that lies in this chunk, in the tensor's coordinates."""
        spans = [(max(s.start, o), min(s.stop, o + n)) for s, o, n in zip(index, self.offsets, self.sizes)]
        return tuple(slice(lo, hi) for lo, hi in spans) if all(lo < hi for lo, hi in spans) else None


class StoredTensor:
    """One tensor of the folder; `read` touches only the bytes it is asked for."""

    def __init__(self, key: str, entry: TensorStorageMetadata, chunks: list[StoredChunk]):
        self.key, self.shape, self.dtype = key, tuple(entry.size), entry.properties.dtype
        self.chunks = sorted(chunks, key=lambda chunk: chunk.offsets)
        self.starts = [chunk.offsets[0] for chunk in self.chunks if chunk.offsets]
        self.longest = max((chunk.sizes[0] for chunk in self.chunks if chunk.sizes), default=0)

    def read(self, index: Index) -> Tensor:
        """The rectangle `index`, as a tensor of its own.

        Raises:
            UserError: the chunks do not cover it, or a chunk is damaged.
        """
        out = torch.empty([s.stop - s.start for s in index], dtype=self.dtype)
        to = out.view(torch.uint8)
        filled = 0
        for chunk in self._candidates(index):
            for piece in row_pieces(inner, chunk.sizes[-1] * out.itemsize) if (inner := chunk.overlap(index)) else ():
                source = map_chunk(chunk, self.dtype)[byte_index(piece, chunk.offsets, out.itemsize)]
                to[byte_index(piece, [s.start for s in index], out.itemsize)] = source
                filled += source.numel()
        if filled != out.nbytes:
            raise UserError(f"{self.key}: the checkpoint holds {filled:,} of {out.nbytes:,} bytes of {index}; it is incomplete")
        return out

    def _candidates(self, index: Index) -> list[StoredChunk]:
        """Chunks whose first axis may meet the index: a stack of layers has thousands."""
        first = bisect_right(self.starts, index[0].start - self.longest)
        return self.chunks[first : bisect_left(self.starts, index[0].stop)]


class TorchDistReader:
    """The tensors of a torch_dist folder by key. Opening it checks the index and every file's length, and reads no tensor.

    Raises:
        UserError: the index is missing, damaged or not to be trusted; a file is missing or cut off.
    """

    def __init__(self, folder: Path):
        self.folder, self.metadata = folder, read_metadata(folder)
        self._check_files()

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """By key; entries that are no tensors, such as extra states, are left out."""
        entries = self.metadata.state_dict_metadata.items()
        return {
            key: StoredTensor(key, entry, self._chunks(key, entry))
            for key, entry in entries
            if isinstance(entry, TensorStorageMetadata)
        }

    def _chunks(self, key: str, entry: TensorStorageMetadata) -> list[StoredChunk]:
        return [self._chunk(key, chunk) for chunk in entry.chunks]

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> StoredChunk:
        info = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        return StoredChunk(tuple(chunk.offsets), tuple(chunk.sizes), self.folder / info.relative_path, info.offset, info.length)

    def _check_files(self) -> None:
        for name, end in file_ends(self.metadata).items():
            file = self.folder / name
            if Path(name).name != name or not file.is_file():
                raise UserError(f"{file}: the index names this file, but it is not there; copy the checkpoint again")
            check_inside(file, self.folder)
            if (size := file.stat().st_size) < end:
                raise UserError(
                    f"{file}: {size:,} bytes, but the index describes {end:,}; it is truncated, copy the checkpoint again"
                )


def file_ends(metadata: Metadata) -> dict[str, int]:
    """How long each file must at least be."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends


def byte_index(index: Index, origin: tuple[int, ...] | list[int], itemsize: int) -> Index:
    """`index` relative to `origin`, its last axis counted in bytes."""
    *outer, last = (slice(s.start - o, s.stop - o) for s, o in zip(index, origin))
    return (*outer, slice(last.start * itemsize, last.stop * itemsize))


def map_chunk(chunk: StoredChunk, dtype: torch.dtype) -> Tensor:
    """The chunk's bytes, [..., last axis x itemsize], mapped: unmapped again when the tensor is dropped.

    Bytes, because a chunk may begin at any address and elements of a dtype may not.
    """
    nbytes = math.prod(chunk.sizes) * dtype.itemsize
    start = data_offset(chunk, nbytes)
    page = start - start % mmap.ALLOCATIONGRANULARITY
    with chunk.file.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), start + nbytes - page, access=mmap.ACCESS_COPY, offset=page)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=nbytes, offset=start - page)
    return flat.view(*chunk.sizes[:-1], chunk.sizes[-1] * dtype.itemsize)


@cache
def data_offset(chunk: StoredChunk, nbytes: int) -> int:
    """Where in its file the chunk's tensor begins.

    Raises:
        UserError: not the zip file that torch.save writes of one tensor of this size.
    """
    try:
        with chunk.file.open("rb") as file:
            archive = torch._C.PyTorchFileReader(_create_file_view(file, chunk.start, chunk.length))
            offset = archive.get_record_offset(TENSOR_DATA)
    except RuntimeError as error:
        raise UserError(f"{chunk.file}: damaged at byte {chunk.start:,}; copy the checkpoint again") from error
    if offset + nbytes > chunk.length:
        raise UserError(f"{chunk.file}: too few bytes at byte {chunk.start:,}; it is damaged, copy the checkpoint again")
    return chunk.start + offset
