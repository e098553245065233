"""Native checkpoint to Hugging Face folder, in one process, a block at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from megakd.checkpointing.blocks import blocks
from megakd.checkpointing.description import versions
from megakd.checkpointing.hf_files import copy_hf_files
from megakd.checkpointing.hf_source import WindowedCheckpoint
from megakd.checkpointing.hf_view import HuggingFaceView
from megakd.checkpointing.hf_writer import TensorPlan, write_weights
from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.native import NativeCheckpoint
from megakd.checkpointing.parameters import Grid, Parameter, checkpoint_parameters
from megakd.checkpointing.peft_folder import stored_adapter, write_adapter
from megakd.checkpointing.publish import check_target, published
from megakd.checkpointing.verify import check_equal, compare_blocks, progress
from megakd.errors import UserError
from megakd.models.gpt_model import METHOD_PARTS
from megakd.models.inspection import inspect
from megakd.models.param_mapping import Source, Vocabulary

REPORT = "megakd_export.json"
NO_WEIGHTS = ("optimizer.", "extra.", "teacher.", METHOD_PARTS)  # keys of what a run keeps besides the model
DTYPE_FIELDS = ("dtype", "torch_dtype")  # transformers 5 writes the first, older ones the second


def export_to_hf(
    load: Path,
    save: Path,
    *,
    iteration: int | None = None,
    max_shard_size: int = 5 * 10**9,
    verify: bool = True,
    force: bool = True,
    merge_adapter: bool = False,
    said: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """Write the Hugging Face folder `save` from one iteration of `load`; optimizer state is not read.

    `force` replaces an earlier export, and nothing else. Of adapters PEFT's folder is written, or with `merge_adapter` the whole model.
    `said` is written into megakd_export.json beside what that says itself.

    Raises:
        UserError: the checkpoint cannot be read or `save` is in use; nothing was written.
    """
    native = NativeCheckpoint(load, iteration=iteration)
    native.verify()
    check_target(save, force=force, ours=lambda path: (path / REPORT).is_file(), what="an export of megakd")
    with published(save) as folder:
        if native.description.adapter and not merge_adapter:
            how = "not checked: the adapters as the checkpoint has them"
            write_report(folder, native, [], [write_adapter(native, folder)], how=how, said=said)
            return save
        names = HuggingFaceView(native).names
        view = ModelFolder.of_adapter(stored_adapter(native), "--load").source if native.description.adapter else HuggingFaceView(native)
        plans = [TensorPlan(name, view.dtype(name), view.shape(name)) for name in names]
        copy_hf_files(native.hf_folder, folder)
        name_dtype(folder / "config.json", [plan.dtype for plan in plans])
        files = _write_view(folder, view, plans, max_shard_size)
        if verify:
            _verify(native, view, WindowedCheckpoint(folder), plans)
        how = "every tensor read back and compared with the checkpoint, bit for bit" if verify else "not checked: --no-verify"
        write_report(folder, native, plans, files, how=how, said=said)
    return save


def _verify(native: NativeCheckpoint, view: Source, written: WindowedCheckpoint, plans: list[TensorPlan]) -> None:
    """A whole checkpoint is compared by the other way, back to Megatron's parameters; merged adapters have none that hold them."""
    if native.description.adapter:
        check_equal(written, view, {plan.name: plan.dtype for plan in plans})
    else:
        verify_export(native, written)


def _write_view(folder: Path, view: Source, plans: list[TensorPlan], max_shard_size: int) -> list[Path]:
    with progress(sum(plan.nbytes for plan in plans), "converting") as bar:

        def read_blocks(plan: TensorPlan):
            for index in blocks(plan.shape, plan.dtype.itemsize):
                block = view.read(plan.name, index)
                yield block
                bar.update(block.nbytes)

        return write_weights(folder, plans, read_blocks, max_shard_size=max_shard_size)


def name_dtype(config_file: Path, dtypes: list[torch.dtype]) -> None:
    """config.json stays as it was, but for a dtype that training changed: from_pretrained would round to the old one."""
    if len(set(dtypes)) > 1:
        return
    config, stored = json.loads(config_file.read_text()), str(dtypes[0]).removeprefix("torch.")
    wrong = [field for field in DTYPE_FIELDS if config.get(field, stored) != stored]
    if wrong:
        config_file.write_text(json.dumps(config | dict.fromkeys(wrong, stored), indent=2) + "\n")


def verify_export(native: NativeCheckpoint, written: WindowedCheckpoint) -> None:
    """Read the folder as a conversion to native would and compare with the checkpoint: not the way it was written."""
    parameters = checkpoint_parameters(native.hf_config, native.description.padded_vocab_size)
    keys = {parameter.key for parameter in parameters}
    lost = [key for key in native.keys if key not in keys and not key.startswith(NO_WEIGHTS)]
    left_out = inspect(written)
    if lost or left_out:
        raise UserError(f"verification: {[*lost, *left_out][0]} of {native.folder} has no place in the folder; nothing was written")
    total = sum(math.prod(native.shape(key)) * native.dtype(key).itemsize for key in keys)
    with progress(total, "verifying") as bar:
        for parameter in parameters:
            compare_blocks(parameter.key, parameter_blocks(native, written, parameter), bar)


def parameter_blocks(native: NativeCheckpoint, written: Source, parameter: Parameter) -> Iterator[tuple[Tensor, Tensor]]:
    """(from the folder, from the checkpoint); of the vocabulary the real rows only."""
    shape = native.shape(parameter.key)[0 if parameter.layer is None else 1 :]
    if isinstance(parameter.mapping, Vocabulary):
        shape = (native.hf_config.vocab_size, *shape[1:])
    whole = Grid(tp=1, pp=1, num_layers=native.hf_config.num_hidden_layers)
    for _, lo, hi in whole.ranges(parameter, shape, native.dtype(parameter.key).itemsize):
        offsets, sizes = parameter.place(shape, lo, hi)
        stored = native.read(parameter.key, tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes)))
        yield parameter.mapping.read(written, lo, hi), stored if parameter.layer is None else stored[0]


def write_report(
    folder: Path, native: NativeCheckpoint, plans: list[TensorPlan], files: list[Path], *, how: str, said: Mapping[str, Any]
) -> None:
    """megakd_export.json: where the weights come from and `how` they were checked."""
    report = {
        **said,
        "checkpoint": native.folder.name,
        "iteration": native.description.iteration,
        "layout": native.description.layout,
        "teacher_layout": native.description.teacher_layout,
        "versions": {"written_by": versions(), "checkpoint": native.description.versions},
        "tensors": len(plans),
        "parameters": sum(math.prod(plan.shape) for plan in plans),
        "vocab_size": native.description.vocab_size,
        "checked": {"how": how, "max_difference": None if "not checked" in how else 0.0},
        "sha256": {file.name: sha256(file) for file in [folder / "config.json", *files] if file.is_file()},
    }
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")


def sha256(file: Path) -> str:
    """In hexadecimal, as the command sha256sum prints it."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
