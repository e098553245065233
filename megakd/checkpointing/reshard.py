"""Native checkpoint to native checkpoint at another TP x PP: weights, optimizer state and everything else it holds.

A checkpoint loads at any layout without this. Resharded, every rank reads its own file from end to end.
"""

from __future__ import annotations

import math
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megakd.checkpointing import hf_files
from megakd.checkpointing.blocks import Index, blocks
from megakd.checkpointing.checksums import checksums, write_checksums
from megakd.checkpointing.description import FORMAT_VERSION, layout_dict
from megakd.checkpointing.import_hf import extra_states
from megakd.checkpointing.native import COMMON, RUN_CONFIG, NativeCheckpoint, is_native, iteration_folder, write_latest
from megakd.checkpointing.parameters import Grid, Parameter, checkpoint_parameters
from megakd.checkpointing.publish import check_target, published
from megakd.checkpointing.torch_dist_writer import TorchDistWriter
from megakd.checkpointing.verify import check_equal, progress
from megakd.models.model_provider import check_layout, padded_vocab_size
from megakd.models.param_mapping import Vocabulary


def reshard(
    load: Path, save: Path, *, tp: int, pp: int, iteration: int | None = None, verify: bool = True, force: bool = False
) -> Path:
    """Write the same iteration under `save` at TP x PP and return its folder.

    Raises:
        UserError: the checkpoint cannot be read, TP or PP does not divide the model, or `save` is in use; nothing was written.
    """
    native = NativeCheckpoint(load, iteration=iteration)
    native.verify()
    check_layout(native.hf_config, tp, pp, flag="--load", name=str(load))
    check_target(save, force=force, ours=is_native, what="native checkpoints")
    description = replace(
        native.description,
        format_version=FORMAT_VERSION,
        layout=layout_dict(tp, pp),
        padded_vocab_size=padded_vocab_size([native.hf_config.vocab_size], tp),
    )
    source = PaddedView(native, description.padded_vocab_size)
    target = iteration_folder(save, description.iteration)
    with published(target) as folder:
        _write_tensors(folder, source, Grid(tp, pp, native.hf_config.num_hidden_layers))
        _copy_other_files(native.folder, folder)
        description.write(folder)
        write_checksums(folder, checksums(folder))
        if verify:
            check_equal(NativeCheckpoint(folder), source, {key: native.dtype(key) for key in native.keys})
    write_latest(save, description.iteration)
    return target


@dataclass
class PaddedView:
    """A checkpoint as it looks with another padded vocabulary: rows past the real one are cut, or zeros."""

    native: NativeCheckpoint
    padded_size: int

    def __post_init__(self):
        self.parameters: dict[str, list[Parameter]] = defaultdict(list)
        for parameter in checkpoint_parameters(self.native.hf_config, self.padded_size):
            self.parameters[parameter.key].append(parameter)

    def parameters_of(self, key: str) -> list[Parameter]:
        """The parameters that a tensor belongs to: its own, or of an optimizer state `optimizer.state.exp_avg.<parameter>`."""
        parts = key.split(".")
        names = (".".join(parts[i:]) for i in range(len(parts)))
        owner = next((name for name in names if name in self.parameters), None)
        same = owner is not None and self.native.shape(owner) == self.native.shape(key)
        return self.parameters[owner] if same else []

    def shape(self, key: str) -> tuple[int, ...]:
        """`padded_size` rows where the vocabulary lies along them, in optimizer state too."""
        shape = self.native.shape(key)
        owners = self.parameters_of(key)
        return (self.padded_size, *shape[1:]) if owners and isinstance(owners[0].mapping, Vocabulary) else shape

    def read(self, key: str, index: Index) -> Tensor:
        """Rows past those that are stored are zeros."""
        real = self.native.shape(key)[0]
        rows = slice(min(index[0].start, real), min(index[0].stop, real))
        data = self.native.read(key, (rows, *index[1:]))
        missing = index[0].stop - index[0].start - data.shape[0]
        return torch.cat([data, data.new_zeros(missing, *data.shape[1:])]) if missing else data


def _write_tensors(folder: Path, source: PaddedView, grid: Grid) -> None:
    native = source.native
    total = sum(math.prod(source.shape(key)) * native.dtype(key).itemsize for key in native.keys)
    with TorchDistWriter(folder) as writer, progress(total, "resharding") as bar:
        for key in native.keys:
            for rank, index in chunks(source, key, grid):
                data = source.read(key, index)
                writer.add_chunk(rank, key, source.shape(key), tuple(s.start for s in index), data)
                bar.update(data.nbytes)
        for rank, key in extra_states([parameter for group in source.parameters.values() for parameter in group], grid):
            writer.add_extra_state(rank, key)


def chunks(source: PaddedView, key: str, grid: Grid) -> Iterator[tuple[int, Index]]:
    """(rank, rectangle) for all of a tensor; what is no parameter's goes to rank 0 whole."""
    shape, itemsize = source.shape(key), source.native.dtype(key).itemsize
    owners = source.parameters_of(key)
    if not owners:
        yield from ((0, index) for index in blocks(shape, itemsize))
    for parameter in owners:
        own = shape if parameter.layer is None else shape[1:]
        for rank, lo, hi in grid.ranges(parameter, own, itemsize):
            offsets, sizes = parameter.place(own, lo, hi)
            yield rank, tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes))


def _copy_other_files(source: Path, target: Path) -> None:
    shutil.copyfile(source / COMMON, target / COMMON)
    shutil.copytree(source / hf_files.FOLDER, target / hf_files.FOLDER)
    if (source / RUN_CONFIG).is_file():
        shutil.copyfile(source / RUN_CONFIG, target / RUN_CONFIG)
