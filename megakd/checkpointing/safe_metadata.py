"""torch_dist keeps its index, `.metadata`, as a pickle. It is read here with nothing but the classes such an index is made of.

Once an index has passed, torch's own reader, which does not look, meets the same names and nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megakd.errors import UserError, check_file
from megakd.model_files import check_inside

METADATA = ".metadata"
MOST_METADATA = 2**30  # bytes
CLASSES = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },  # megatron keeps its plans
}


class ForbiddenGlobal(pickle.UnpicklingError):
    """A pickle names something that an index never holds."""


class MetadataUnpickler(pickle.Unpickler):
    """Finds data classes of torch's checkpoint index and torch's dtypes; anything else is refused before it is even imported."""

    def find_class(self, module: str, name: str):
        """pickle asks here for everything that a file names.

        Raises:
            ForbiddenGlobal: it is none of CLASSES and no dtype.
        """
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in CLASSES.get(module, ()):
            raise ForbiddenGlobal(f"{module}.{name}")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """The index of a torch_dist folder; no code of the file's choosing runs.

    Raises:
        UserError: there is none, it is damaged, or it names anything that does not belong in an index.
    """
    file = folder / METADATA
    if not file.is_file():
        raise UserError(f"{file}: missing; the checkpoint is incomplete, use another iteration or copy it again")
    check_inside(file, folder)
    check_file(file, most=MOST_METADATA)
    try:
        with file.open("rb") as stream:
            metadata = MetadataUnpickler(stream).load()
        if isinstance(metadata, Metadata):
            check_entries(metadata)
    except ForbiddenGlobal as error:
        raise UserError(
            f"{file}: names {error}, which a checkpoint index never needs and which could run code; do not trust it"
        ) from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise UserError(f"{file}: damaged or cut off ({type(error).__name__}); copy the checkpoint again") from error
    if not isinstance(metadata, Metadata):
        raise UserError(f"{file}: is a {type(metadata).__name__}, not a checkpoint index; copy the checkpoint again")
    return metadata


def check_entries(metadata: Metadata) -> None:
    """Every entry is of the type that it has in an index; that every chunk has a place in a file.

    Raises:
        TypeError, ValueError: it is not.
    """
    places = metadata.storage_data
    for place in places.values():
        whole = type(place.offset) is int and type(place.length) is int and place.offset >= 0 and place.length >= 0
        if not (isinstance(place.relative_path, str) and whole):
            raise TypeError("a place in no file")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError("a key that is no name")
        for chunk in entry.chunks if isinstance(entry, TensorStorageMetadata) else ():
            if MetadataIndex(key, chunk.offsets) not in places or len(chunk.offsets) != len(chunk.sizes):
                raise ValueError("a chunk without a place")
            check_sizes(chunk.offsets, chunk.sizes, entry.size)


def check_sizes(offsets: Sequence[int], sizes: Sequence[int], whole: Sequence[int]) -> None:
    """The chunk lies in its tensor.

    Raises:
        ValueError: it does not.
    """
    if len(whole) != len(sizes) or any(not 0 <= first <= first + size <= end for first, size, end in zip(offsets, sizes, whole)):
        raise ValueError("a chunk beyond its tensor")
