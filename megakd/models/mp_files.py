"""mpN/pytorch_model_<i>.bin beside a config.json: N pieces of a model, as MiniLLM's and PromptKD's convert_mp.py and their runs with
--model-parallel leave it.

A tensor is joined along the axis that tensor parallelism cuts, which the family's own table names: both cut rows of q, k, v, of the first
MLP layer and of the vocabulary, and columns of the two output projections. What is not cut lies whole in every piece; the first's is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megakd.errors import UserError, tell
from megakd.models.model_provider import family_of
from megakd.models.pytorch_file import tensors_of

FOLDER, PIECE = re.compile(r"mp([1-9]\d*)"), "pytorch_model_{}.bin"
FAMILIES = ("llama", "mistral", "opt")  # those of convert_mp.py that are read here


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor that lies in several files, `axis` across them; in the first alone where that is None."""

    files: tuple[Path, ...]
    name: str
    axis: int | None

    @property
    def file(self) -> Path:
        """For messages."""
        return self.files[0]

    @property
    def pieces(self) -> list[Tensor]:
        """Views of the mapped files."""
        return [tensors_of(file)[self.name] for file in (self.files[:1] if self.axis is None else self.files)]

    @property
    def dtype(self) -> torch.dtype:
        """Of the pieces."""
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        pieces = self.pieces
        shape = list(pieces[0].shape)
        if self.axis is not None:
            shape[self.axis] = sum(piece.shape[self.axis] for piece in pieces)
        return tuple(shape)

    def read(self, index: tuple[slice, ...] | None = None) -> Tensor:
        """The rectangle `index` of the whole; a view of one file where it lies in one."""
        index = index or tuple(slice(None) for _ in self.shape)
        if self.axis is None:
            return self.pieces[0][index]
        lo, hi, _ = index[self.axis].indices(self.shape[self.axis])
        found, first = [], 0
        for piece in self.pieces:
            size = piece.shape[self.axis]
            part = slice(max(lo - first, 0), min(hi - first, size))
            if part.start < part.stop or not (found or lo < hi):
                found.append(piece[(*index[: self.axis], slice(part.start, max(part.start, part.stop)), *index[self.axis + 1 :])])
            first += size
        return found[0] if len(found) == 1 else torch.cat(found, self.axis)


def mp_sizes(folder: Path) -> list[int]:
    """The N of every mpN that is there."""
    found = (FOLDER.fullmatch(path.name) for path in folder.glob("mp*") if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def joined_tensors(folder: Path, size: int, hf: PretrainedConfig, *, flag: str) -> dict[str, JoinedTensor]:
    """All tensors of FOLDER/mp<size>, by name.

    Raises:
        UserError: a piece is missing or damaged, or they do not belong together; or it is a family that nobody cuts so.
    """
    parts = tuple(folder / f"mp{size}" / PIECE.format(i) for i in range(size))
    if missing := [part for part in parts if not part.is_file()]:
        raise UserError(f"{flag} {folder}: {missing[0]} is not there, one of the {size} pieces of mp{size}; copy the folder again")
    if hf.model_type not in FAMILIES:
        raise UserError(
            f"{flag} {folder}: mp{size} of a {hf.model_type} model; pieces of {', '.join(FAMILIES)} are read, as MiniLLM makes them; "
            "give the folder that save_pretrained wrote"
        )
    names = [tensors_of(part).keys() for part in parts]
    if odd := sorted(set().union(*names) - set.intersection(*map(set, names))):
        raise UserError(f"{flag} {folder}: {odd[0]} is in some pieces of mp{size}, and not in all; copy the folder again")
    axes = dict(cut_axes(hf))
    joined = {name: JoinedTensor(parts, name, axes.get(re.sub(r"(?<=\.)\d+(?=\.)", "*", name))) for name in names[0]}
    if unlike := [name for name, tensor in joined.items() if tensor.axis is None and not is_alike(tensor)]:
        tell(f"{folder / f'mp{size}'}: {unlike[0]} and {len(unlike) - 1} more are not alike in all pieces; those of the first are taken")
    return joined


def cut_axes(hf: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Hugging Face names, `*` for the layer number, with the axis across pieces, of the tensors that have one."""
    table = family_of(hf).table(hf, hf.vocab_size)
    for mapping in table.values():
        for tensor in mapping.sources() if mapping.axis is not None else ():
            yield tensor.name, mapping.axis
    yield "lm_head.weight", 0  # beside a tied embedding, too


def is_alike(tensor: JoinedTensor) -> bool:
    """Whether it is the same in every piece."""
    first, *others = (tensors_of(file)[tensor.name] for file in tensor.files)
    return all(torch.equal(first, other) for other in others)
