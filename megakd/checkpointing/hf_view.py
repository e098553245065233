"""A native checkpoint under Hugging Face names: the same `Source` that a Hugging Face folder is.

Between the two formats rows only move. So a mapping that is asked where its row *numbers* go says which Megatron row each row of
a Hugging Face tensor is; consecutive rows are then read together, and nothing else is read.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megakd.checkpointing.blocks import Index
from megakd.checkpointing.hf_files import read_skipped_rows
from megakd.checkpointing.native import NativeCheckpoint
from megakd.checkpointing.parameters import Parameter, checkpoint_parameters
from megakd.models.param_mapping import HFTensor, Vocabulary


@dataclass(frozen=True)
class Run:
    """`length` rows of a Hugging Face tensor from `start` on: those of a Megatron parameter from `row` on, or skipped rows."""

    start: int
    length: int
    row: int
    parameter: Parameter | None


class HuggingFaceView:
    """Shapes, dtypes and slices by Hugging Face name; `names` lists them in the model's order."""

    def __init__(self, native: NativeCheckpoint):
        self.native = native
        self.pieces: dict[str, list[tuple[HFTensor, Parameter]]] = defaultdict(list)
        for parameter in checkpoint_parameters(native.hf_config, native.description.padded_vocab_size):
            for tensor in parameter.mapping.sources():
                self.pieces[tensor.name].append((tensor, parameter))
        self.runs = lru_cache(maxsize=8)(self._runs)  # blocks of one tensor follow each other

    @property
    def names(self) -> list[str]:
        """In the model's order; a tied head is not among them."""
        return list(self.pieces)

    @cached_property
    def skipped(self) -> dict[str, Tensor]:
        """Rows at the head of a tensor that no parameter holds, by the tensor's name."""
        return read_skipped_rows(self.native.hf_folder)

    @property
    def files(self) -> set[Path]:
        """Those of the checkpoint."""
        return {file for file in self.native.folder.rglob("*") if file.is_file()}

    def __contains__(self, name: str) -> bool:
        return name in self.pieces

    def dtype(self, name: str) -> torch.dtype:
        """That of the checkpoint: a conversion changes none."""
        return self.native.dtype(self._key(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """As Hugging Face stores it, without the padding of the vocabulary."""
        last = self.runs(name)[-1]
        shape = (last.start + last.length, *self._parameter_shape(self.pieces[name][0][1])[1:])
        return shape[::-1] if self._transposed(name) else shape

    def place(self, name: str) -> str:
        """The checkpoint's folder, for messages."""
        return str(self.native.folder)

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a Hugging Face tensor, in Hugging Face's orientation."""
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, self.shape(name)))
        outputs, *inputs = index[::-1] if self._transposed(name) else index
        pieces = [self._read_run(run, name, outputs, inputs) for run in self.runs(name) if _meets(run, outputs)]
        rows = torch.cat(pieces) if len(pieces) != 1 else pieces[0]
        return rows.t() if self._transposed(name) else rows

    def _read_run(self, run: Run, name: str, outputs: slice, inputs: list[slice]) -> Tensor:
        lo = run.row + max(outputs.start, run.start) - run.start
        hi = run.row + min(outputs.stop, run.start + run.length) - run.start
        if run.parameter is None:
            return self.skipped[name][(slice(lo, hi), *inputs)]
        stack = () if run.parameter.layer is None else (slice(run.parameter.layer, run.parameter.layer + 1),)
        read = self.native.read(run.parameter.key, (*stack, slice(lo, hi), *inputs))
        return read.flatten(0, 1) if stack else read

    def _runs(self, name: str) -> list[Run]:
        runs, start = [], 0
        if name in self.skipped:
            start = self.skipped[name].shape[0]
            runs.append(Run(0, start, 0, None))
        for tensor, parameter in sorted(self.pieces[name], key=lambda piece: piece[0].part):
            for row, length in consecutive(self._megatron_rows(tensor, parameter)):
                runs.append(Run(start, length, row, parameter))
                start += length
        return runs

    def _megatron_rows(self, tensor: HFTensor, parameter: Parameter) -> Tensor:
        """For every row of the Hugging Face tensor its row in the full Megatron parameter."""
        numbers = torch.arange(self._parameter_shape(parameter)[0])
        rows = dict(parameter.mapping.to_hf(numbers))[tensor]
        return rows[: self.native.hf_config.vocab_size] if isinstance(parameter.mapping, Vocabulary) else rows

    def _parameter_shape(self, parameter: Parameter) -> tuple[int, ...]:
        shape = self.native.shape(parameter.key)
        return shape if parameter.layer is None else shape[1:]

    def _key(self, name: str) -> str:
        return self.pieces[name][0][1].key

    def _transposed(self, name: str) -> bool:
        return self.pieces[name][0][0].transposed and len(self._parameter_shape(self.pieces[name][0][1])) == 2


def _meets(run: Run, rows: slice) -> bool:
    return run.start < rows.stop and rows.start < run.start + run.length


def consecutive(rows: Tensor) -> list[tuple[int, int]]:
    """(first, length) of every stretch of consecutive numbers."""
    ends = [*(rows.diff() != 1).nonzero().flatten().add(1).tolist(), len(rows)]
    starts = [0, *ends[:-1]]
    return [(int(rows[lo]), hi - lo) for lo, hi in zip(starts, ends)]
