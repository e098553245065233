"""Hugging Face folders on disk: config and safetensors files, read tensor by tensor and slice by slice.

A file is mapped for one read and unmapped again, so that memory stays at the slice in hand whatever the model's size.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from megakd.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LENGTH = struct.Struct("<Q")  # a safetensors file: u64 header length, JSON header, data


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, its name there, its shape and safetensors' name of its dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


class HFCheckpoint:
    """The weights of a Hugging Face folder. Opening it reads and checks every file's header, and no weight.

    Raises:
        UserError: no such folder, no config.json, only pickled weights, a missing or truncated file.
    """

    def __init__(self, folder: str | Path, *, flag: str = "--model"):
        self.folder, self.flag = Path(folder), flag
        self._check_folder()
        self.tensors = {name: stored for file in self._files() for name, stored in read_header(file).items()}

    @cached_property
    def config(self) -> PretrainedConfig:
        """The folder's config.json."""
        return load_hf_config(self.folder, flag=self.flag)

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored: GPT-2's Conv1D weights are [in, out]."""
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype: F32, BF16, ..."""
        return self._find(name).dtype

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """A view of the mapped file, which stays mapped as long as the tensor lives."""
        stored = self._find(name)
        with safe_open(stored.file, framework="pt") as file:
            return file.get_slice(stored.name)[index]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or without_prefix(name) in self.tensors

    def _find(self, name: str) -> StoredTensor:
        """Folders saved from a base model leave out its prefix: `h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`."""
        found = self.tensors.get(name) or self.tensors.get(without_prefix(name))
        if found is None:
            raise UserError(
                f"{self.flag} {self.folder}: tensor {name!r} is missing; the folder is incomplete or not what its config.json says"
            )
        return found

    def _check_folder(self) -> None:
        if not self.folder.is_dir():
            raise UserError(f"{self.flag} {self.folder}: no such folder; give a Hugging Face folder or a native checkpoint")
        if not (self.folder / "config.json").is_file():
            inside = [f"{self.folder / name}" for name in ("hf", "checkpoints") if (self.folder / name).is_dir()]  # of a run
            right = " or ".join(inside) or "the folder that save_pretrained wrote, or a native checkpoint"
            raise UserError(f"{self.flag} {self.folder}: no config.json; give {right}")

    def _files(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            weight_map = json.loads((self.folder / INDEX).read_text())["weight_map"]
            return [self.folder / name for name in sorted(set(weight_map.values()))]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        if pickled := sorted(path.name for path in self.folder.glob("*.bin")):
            raise UserError(
                f"{self.flag} {self.folder}: {pickled[0]} is a pickle, which can run code when it is loaded; "
                "load it where you trust it and save_pretrained(..., safe_serialization=True)"
            )
        raise UserError(f"{self.flag} {self.folder}: no {SINGLE} and no {INDEX}; the weights are missing")


def without_prefix(name: str) -> str:
    """`transformer.h.0.ln_1.weight` -> `h.0.ln_1.weight`; "" for a name without a dot."""
    return name.partition(".")[2]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        UserError: the file is missing, shorter than its header says, or not a safetensors file.
    """
    if not file.is_file():
        raise UserError(f"{file}: the index names this file, but it is not there; download it again")
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = HEADER_LENGTH.unpack(stream.read(HEADER_LENGTH.size))
            assert length < size
            header = json.loads(stream.read(length))
    except (struct.error, AssertionError, ValueError) as error:
        raise UserError(f"{file}: not a safetensors file, or cut off in its header; copy or download it again") from error
    header.pop("__metadata__", None)
    end = HEADER_LENGTH.size + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise UserError(f"{file}: {size:,} bytes, but its header describes {end:,}; it is truncated, copy or download it again")
    return {name: StoredTensor(file, name, tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}


def load_hf_config(folder: Path, *, flag: str) -> PretrainedConfig:
    """config.json as transformers reads it.

    Raises:
        UserError: not JSON, or a model type that transformers does not know.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # else it may ask, on every rank
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{flag} {folder}: config.json cannot be read ({reason}); give a folder that save_pretrained wrote"
        ) from error
