"""A native checkpoint on disk, opened without torch.distributed.

ROOT/latest_checkpointed_iteration.txt
ROOT/iter_0000100/   torch_dist files, megakd_checkpoint.json, huggingface/, run_config.yaml where a run wrote it
"""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megakd.checkpointing import hf_files
from megakd.checkpointing.blocks import Index
from megakd.checkpointing.checksums import CHECKSUMS, read_checksums, verify, verify_beside_tensors
from megakd.checkpointing.description import FILE, Description
from megakd.checkpointing.parameters import stored_shapes
from megakd.checkpointing.torch_dist_reader import StoredTensor, TorchDistReader
from megakd.errors import UserError, file_errors, tell
from megakd.models.hf_config import load_hf_config
from megakd.models.model_provider import family_of
from megakd.reporting.own_folder import write_text

LATEST, RUN_CONFIG = "latest_checkpointed_iteration.txt", "run_config.yaml"
COMMON = "common.pt"  # what megatron-core keeps besides tensors: numbers and names


class NativeCheckpoint:
    """One iteration. Opening it checks everything but the tensors themselves.

    Args:
        path: a checkpoint folder with its iterations, or one iteration's folder.
        iteration: which one; the latest by default.

    Raises:
        UserError: no such checkpoint or iteration; it is incomplete, damaged, or holds a pickle that is not to be trusted.
    """

    def __init__(self, path: str | Path, *, iteration: int | None = None, flag: str = "--load"):
        self.flag = flag
        self.folder = find_iteration(Path(path), iteration, flag=flag)
        self.hf_folder = self.folder / hf_files.FOLDER
        try:
            self.description, self.reader = opened(self.folder)
        except UserError as error:
            raise UserError(f"{error}; {way_back(self.folder, flag)}") from error

    def verify(self, *, rank: int = 0, ranks: int = 1) -> None:
        """That this rank's share of the files is what was written. An earlier version wrote no checksums, which is told.

        Raises:
            UserError: one is not.
        """
        if not (self.folder / CHECKSUMS).is_file():
            tell(f"{self.folder}: an earlier version wrote it without checksums; damage in its tensors would not be found")
            return
        try:
            verify(self.folder, rank=rank, ranks=ranks)
        except UserError as error:
            raise UserError(f"{error}; {way_back(self.folder, self.flag)}") from error

    @cached_property
    def hf_config(self) -> PretrainedConfig:
        """The config.json that the model came with.

        Raises:
            UserError: a model that is not supported, or the tensors are not what config.json says.
        """
        hf = load_hf_config(self.hf_folder, flag=self.flag)
        family_of(hf, flag=self.flag, name=str(self.folder))
        if hf.vocab_size != self.description.vocab_size:
            raise UserError(
                f"{self.flag} {self.folder}: config.json says vocab_size {hf.vocab_size}, {FILE} says {self.description.vocab_size}; "
                "copy the checkpoint again"
            )
        weights = {} if self.description.adapter else stored_shapes(hf, self.description.padded_vocab_size)
        for key, shape in weights.items():
            if self.shape(key) != shape:
                raise UserError(
                    f"{self.flag} {self.folder}: {key} has shape {self.shape(key)}, but its config.json asks for {shape}; "
                    "make the checkpoint anew with hf_to_mp.py"
                )
        return hf

    @property
    def keys(self) -> list[str]:
        """Of all tensors: weights, optimizer state, the soft prompt and what else a method learns."""
        return list(self.reader.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the whole tensor over all ranks, layers stacked on the first axis."""
        return self._find(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """As it lies on disk."""
        return self._find(key).dtype

    def read(self, key: str, index: Index) -> Tensor:
        """A rectangle of a tensor under its key in the checkpoint; layers are stacked on the first axis."""
        return self._find(key).read(index)

    def __contains__(self, key: str) -> bool:
        return key in self.reader.tensors

    def _find(self, key: str) -> StoredTensor:
        if key not in self.reader.tensors:
            raise UserError(f"{self.folder}: holds no tensor {key!r}; it is not what its config.json says")
        return self.reader.tensors[key]


def opened(folder: Path) -> tuple[Description, TorchDistReader]:
    """What an iteration says of itself, and its tensors, none of which is read: the other files are compared before they are believed.

    Raises:
        UserError: a file is missing or damaged.
    """
    if (folder / CHECKSUMS).is_file():
        verify_beside_tensors(folder)
    description = Description.read(folder)
    if description.format_version > 1:
        read_checksums(folder)
    return description, TorchDistReader(folder)


def iteration_folder(root: Path, iteration: int) -> Path:
    """ROOT/iter_0000100, Megatron-LM's name."""
    return root / f"iter_{iteration:07d}"


def remove_older(root: Path, kept: int) -> None:
    """All but the newest iterations, so many up to the latest; each under a hidden name first, for half of one looks like a whole one."""
    latest = read_latest(root)
    found = sorted(path for path in root.glob("iter_*") if path <= iteration_folder(root, latest))
    for path in found[:-kept]:
        path.rename(path.with_name(f".{path.name}.removed"))
    for path in root.glob(".iter_*.removed"):
        shutil.rmtree(path, ignore_errors=True)


def is_native(path: Path) -> bool:
    """Whether a folder is a checkpoint with its iterations, or one iteration."""
    return (path / LATEST).is_file() or (path / FILE).is_file()


def find_iteration(path: Path, iteration: int | None = None, *, flag: str = "--load") -> Path:
    """The folder of one iteration; the latest by default."""
    if not path.is_dir():
        raise UserError(f"{flag} {path}: no such folder; give a checkpoint folder, or one iter_* folder in it")
    if iteration is None and (path / FILE).is_file():
        return path
    number = read_latest(path, flag=flag) if iteration is None else iteration
    if number is None:
        right = path / "checkpoints" if is_native(path / "checkpoints") else "the folder that hf_to_mp.py's --save named"
        raise UserError(f"{flag} {path}: no {LATEST}, so it is not a native checkpoint; give {right}")
    folder = iteration_folder(path, number)
    if not folder.is_dir():
        there = ", ".join(sorted(found.name for found in path.glob("iter_*"))) or "none"
        raise UserError(f"{flag} {path}: holds no {folder.name} (there: {there}); {way_back(folder, flag)}")
    return folder


def way_back(lost: Path, flag: str) -> str:
    """What to do where an iteration is missing or damaged: the one before it that is whole, and how `flag`'s command takes it."""
    if (whole := one_before(lost)) is None:
        return f"no other iteration there is whole; give another {flag}"
    number = number_of(whole)
    ways = {
        "--load": f"choose it with --iteration {number}",
        "--save": f"--resume {number} continues from it",
    }
    return f"the newest other iteration that can be opened is {number}; " + ways.get(flag, f"give {flag} {whole}")


def one_before(lost: Path) -> Path | None:
    """The newest iteration before a lost one that can be opened, or where there is none the newest of all others."""
    others = sorted((path for path in lost.parent.glob("iter_*") if path != lost), reverse=True)
    return next(filter(is_whole, [*filter(lambda path: path < lost, others), *others]), None)


def number_of(folder: Path) -> int:
    """Which iteration a folder holds."""
    return int(folder.name.removeprefix("iter_"))


def is_whole(folder: Path) -> bool:
    """Whether an iteration can be opened: all but the numbers themselves."""
    try:
        opened(folder)
    except UserError:
        return False
    return True


def read_latest(root: str | Path, *, flag: str = "--load") -> int | None:
    """The last iteration that was saved completely, None where none was.

    Raises:
        UserError: latest_checkpointed_iteration.txt does not hold a number.
    """
    file = Path(root) / LATEST
    if not file.is_file():
        return None
    with file_errors(file):
        text = file.read_text(encoding="utf-8").strip()
    if text == "release":
        raise UserError(f"{flag} {root}: is Megatron-LM's own 'release' format, which is not read; give a Hugging Face folder made of it")
    if not (text.isdecimal() and text.isascii() and len(text) < 10):
        lost = file.parent / "iter_unknown"
        raise UserError(f"{flag} {root}: {LATEST} says {text[:40]!r}, which is no iteration; {way_back(lost, flag)}")
    return int(text)


def write_latest(root: Path, iteration: int) -> None:
    """In one step: a reader finds the number before or the new one."""
    write_text(root / LATEST, f"{iteration}\n")
