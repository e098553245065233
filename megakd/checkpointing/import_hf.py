"""Hugging Face folder to native checkpoint, in one process, a block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megakd.checkpointing.checksums import checksums, write_checksums
from megakd.checkpointing.description import Description, layout_dict
from megakd.checkpointing.hf_files import write_hf_folder
from megakd.checkpointing.hf_source import WindowedCheckpoint
from megakd.checkpointing.hf_view import HuggingFaceView
from megakd.checkpointing.native import NativeCheckpoint, is_native, iteration_folder, write_latest
from megakd.checkpointing.parameters import Grid, Parameter, checkpoint_parameters, extra_state_key
from megakd.checkpointing.publish import check_target, published
from megakd.checkpointing.torch_dist_writer import TorchDistWriter, write_common
from megakd.checkpointing.verify import check_equal, progress
from megakd.errors import UserError, tell
from megakd.models.hf_checkpoint import DTYPES
from megakd.models.hub_cache import local_folder
from megakd.models.inspection import HEAD, inspect
from megakd.models.model_provider import check_layout, not_finite, padded_vocab_size


@dataclass(frozen=True)
class PlannedParameter:
    """A parameter with the shape and dtype that its Hugging Face tensors give it."""

    parameter: Parameter
    shape: tuple[int, ...]
    dtype: torch.dtype


def hf_to_native(
    model: Path, save: Path, *, tp: int, pp: int, verify: bool = True, force: bool = False, mp_size: int = 0, model_type: str = ""
) -> Path:
    """Write iteration 0 of checkpoint `save` and return its folder.

    Args:
        mp_size: N, where the weights are to be those of MODEL/mpN.
        model_type: what config.json is expected to say.

    Raises:
        UserError: the model cannot be read, TP or PP does not divide it, or `save` is in use; nothing was written.
    """
    model = local_folder(model, flag="--model")
    source = WindowedCheckpoint(model, mp_size=mp_size)
    if model_type not in ("", source.config.model_type):
        raise UserError(f"--model-type {model_type}: config.json of --model {model} says {source.config.model_type}; leave it out")
    left_out, hf = inspect(source), source.config
    check_layout(hf, tp, pp, name=str(model))
    check_target(save, force=force, ours=is_native, what="native checkpoints")
    grid, width = Grid(tp, pp, hf.num_hidden_layers), padded_vocab_size([hf.vocab_size], tp)
    plan = plan_import(source, width)
    with published(iteration_folder(save, 0)) as folder:
        _write_parameters(folder, source, plan, grid)
        write_hf_folder(model, folder, hf, source)
        Description(iteration=0, vocab_size=hf.vocab_size, padded_vocab_size=width, layout=layout_dict(tp, pp)).write(folder)
        write_checksums(folder, checksums(folder))
        if verify:
            verify_import(NativeCheckpoint(folder), source, left_out)
    write_latest(save, 0)
    return iteration_folder(save, 0)


def plan_import(source: WindowedCheckpoint, padded_size: int) -> list[PlannedParameter]:
    """Every parameter's shape and dtype, from the headers alone.

    Raises:
        UserError: a tensor is missing, or its shape or dtype does not fit with the others.
    """
    plan = [_planned(source, parameter) for parameter in checkpoint_parameters(source.config, padded_size)]
    first: dict[str, PlannedParameter] = {}
    for item in plan:
        model = first.setdefault(item.parameter.key, item)
        if (item.shape, item.dtype) != (model.shape, model.dtype):
            names = ", ".join(tensor.name for tensor in item.parameter.mapping.sources())
            raise UserError(
                f"{source.flag} {source.folder}: {names} is {item.dtype} of shape {item.shape}, but in layer 0 {model.dtype} of "
                f"shape {model.shape}; layers must be alike, save the model with one dtype"
            )
    return plan


def _planned(source: WindowedCheckpoint, parameter: Parameter) -> PlannedParameter:
    tensors = parameter.mapping.sources()
    found = {source.dtype(tensor.name) for tensor in tensors}
    if len(found) > 1 or not found <= set(DTYPES):
        names = ", ".join(tensor.name for tensor in tensors)
        raise UserError(
            f"{source.flag} {source.folder}: {names} is stored as {', '.join(sorted(found))}; "
            f"save the model with one of {', '.join(DTYPES)}"
        )
    return PlannedParameter(parameter, tuple(parameter.mapping.shape(source)), DTYPES[found.pop()])


def _write_parameters(folder: Path, source: WindowedCheckpoint, plan: list[PlannedParameter], grid: Grid) -> None:
    diverged: dict[Parameter, None] = {}
    with TorchDistWriter(folder) as writer, progress(sum(_stored_bytes(item) for item in plan), "converting") as bar:
        for item in plan:
            for rank, lo, hi in grid.ranges(item.parameter, item.shape, item.dtype.itemsize):
                offsets, sizes = item.parameter.place(item.shape, lo, hi)
                data = item.parameter.mapping.read(source, lo, hi).contiguous()
                diverged |= {item.parameter: None} if not_finite(data) else {}
                writer.add_chunk(
                    rank, item.parameter.key, grid.stored_shape(item.parameter, item.shape), offsets, data.view(sizes)
                )
                bar.update(data.nbytes)
        for rank, key in extra_states([item.parameter for item in plan], grid):
            writer.add_extra_state(rank, key)
    write_common({}, folder)
    for parameter in list(diverged)[:1]:
        name = parameter.mapping.sources()[0].name
        tell(f"{source.place(name)}: {name} and {len(diverged) - 1} more hold NaN or infinite values, which are converted as they are")


def _stored_bytes(item: PlannedParameter) -> int:
    return torch.Size(item.shape).numel() * item.dtype.itemsize


def extra_states(parameters: list[Parameter], grid: Grid) -> Iterator[tuple[int, str]]:
    """(rank, key) of each linear layer's extra state: the stage's first rank writes it."""
    for parameter in parameters:
        if key := extra_state_key(parameter, grid.num_layers):
            yield grid.stage(parameter) * grid.tp, key


def verify_import(native: NativeCheckpoint, source: WindowedCheckpoint, left_out: set[str]) -> None:
    """Read the checkpoint under Hugging Face names, the way back, and compare with every tensor of the folder that was not left out.

    Raises:
        UserError: one differs, or is not there.
    """
    view = HuggingFaceView(native)
    carried = {source.stored_name(name) for name in view.names} | ({HEAD} if native.hf_config.tie_word_embeddings else set())
    if lost := sorted(source.tensors.keys() - left_out - carried):
        raise UserError(f"verification: {lost[0]} of {source.folder} is not in the checkpoint; nothing was written")
    check_equal(view, source, {name: view.dtype(name) for name in view.names})
