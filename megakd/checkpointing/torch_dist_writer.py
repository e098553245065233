"""Write a torch_dist folder chunk by chunk in one process: what megatron-core's dist_checkpointing writes from many ranks.

One file a rank of the layout, `__<rank>_0.distcp`, in which chunks follow each other; the index says where each one lies.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megakd.checkpointing.native import COMMON
from megakd.checkpointing.safe_metadata import METADATA

BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


class TorchDistWriter:
    """Used in a `with` block; the index is written when the block ends well."""

    def __init__(self, folder: Path):
        self.folder, self.files, self.stack = folder, {}, ExitStack()
        self.entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, error, *_) -> None:
        for file in self.files.values():
            if error is None:
                flush(file)
        self.stack.close()
        if error is None:
            self._write_index()

    def add_chunk(self, rank: int, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], data: Tensor) -> None:
        """A rectangle of tensor `key` of the global `shape`, at `offsets`; `data` has the rectangle's shape."""
        entry = self.entries.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=data.dtype), torch.Size(shape), []))
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), data.shape))
        data = data.contiguous()
        own = data if data.untyped_storage().nbytes() == data.nbytes else data.clone()  # torch.save writes whole storages
        self._append(rank, MetadataIndex(key, offsets), own)

    def add_extra_state(self, rank: int, key: str) -> None:
        """megatron-core's linear layers each ask for an extra state; without Transformer Engine it is None."""
        self.entries[key] = BytesStorageMetadata()
        self._append(rank, MetadataIndex(key), [None])

    def _append(self, rank: int, index: MetadataIndex, value: Tensor | list) -> None:
        file = self._file(rank)
        start = file.tell()
        torch.save(value, file)
        self.places[index] = _StorageInfo(Path(file.name).name, start, file.tell() - start)

    def _file(self, rank: int) -> io.BufferedWriter:
        if rank not in self.files:
            self.files[rank] = self.stack.enter_context((self.folder / f"__{rank}_0.distcp").open("wb"))
        return self.files[rank]

    def _write_index(self) -> None:
        (self.folder / "metadata.json").write_text(json.dumps(BACKEND))
        with (self.folder / METADATA).open("wb") as file:
            pickle.dump(Metadata(self.entries, storage_data=self.places, version=CURRENT_DCP_VERSION), file)
            flush(file)


def write_common(common: dict, folder: Path) -> None:
    """What is no tensor, by way of memory: of a full disk torch.save into a path says no more than "iostream error"."""
    whole = io.BytesIO()
    torch.save(common, whole)
    with (folder / COMMON).open("wb") as file:
        file.write(whole.getvalue())
        flush(file)


def flush(file: io.BufferedWriter) -> None:
    """On disk, not only in the page cache: a name is given to nothing less."""
    file.flush()
    os.fsync(file.fileno())
