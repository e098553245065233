"""Save and load a run: weights, optimizer, soft prompt, a teacher that follows the student; what was saved at one TP x PP x DP loads at
any other.

Random state is not saved: the trainer seeds anew from (seed, iteration), which means the same at every layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megakd.checkpointing.checksums import checksums, write_checksums
from megakd.checkpointing.description import Description, layout_dict
from megakd.checkpointing.hf_files import FOLDER, write_hf_folder
from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.native import RUN_CONFIG, NativeCheckpoint, iteration_folder, number_of, remove_older, write_latest
from megakd.checkpointing.parameters import HEAD
from megakd.checkpointing.peft_folder import adapter_config
from megakd.checkpointing.publish import hidden, published, writing
from megakd.checkpointing.space import bytes_to_write, check_room, telling_what_is_needed
from megakd.checkpointing.torch_dist_save import StagedSave, load
from megakd.data.end_ids import EndIds, write_end_ids
from megakd.errors import UserError
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.runtime.background import background
from megakd.runtime.initialize import agreed, hear
from megakd.runtime.parallel_layout import Grid, ParallelLayout
from megakd.runtime.waiting import wait_for_all

OPTIMIZER_SHARDING = "fully_reshardable"  # megatron-core's default kind cannot be saved at all in 0.16.1
KINDS = {"distrib_optim_sharding_type": OPTIMIZER_SHARDING}
TEACHER = "teacher."
EXTRA, SCALAR = "extra.", "extra.scalar."  # torch_dist knows no tensors without axes


def save_checkpoint(
    root: str | Path,
    iteration: int,
    *,
    model: HiddenStateGPTModel,
    source: ModelFolder,
    ends: EndIds | None = None,
    optimizer: MegatronOptimizer | None = None,
    extra_tensors: dict[str, Tensor] | None = None,
    run_config: Path | None = None,
    teacher_layout: ParallelLayout | Grid | None = None,
    teacher: TeacherWeights | None = None,
    keep_last: int | None = None,
    in_background: bool = False,
) -> Path:
    """Write ROOT/iter_<iteration> from all ranks and make it the latest; returns its folder.

    Args:
        model: this rank's stage, without DistributedDataParallel around it.
        source: where the model came from: its config and tokenizer go into the checkpoint.
        ends: where answers of the model end, for those files to say.
        extra_tensors: small tensors by name, alike on all ranks (the soft prompt and its moments); rank 0's are written.
        run_config: the run's config.yaml.
        teacher: weights of a teacher that no other folder has.
        keep_last: how many iterations stay when this one is there; None: all.
        in_background: of what is to be written a copy is made, and `background` writes it; what was in it before is settled first.
    """
    target = iteration_folder(Path(root), iteration)
    state = sharded_state(model, optimizer, is_loading=False)
    state["teacher"] = teacher.sharded_state() if teacher else {}
    state["extra"] = {name: _replicated(name, tensor) for name, tensor in (extra_tensors or {}).items()}

    def describe(folder: Path) -> None:
        _describe(model, iteration, teacher_layout, source).write(folder)
        write_hf_folder(source.hf_folder, folder, source.config)
        if ends is not None:
            write_end_ids(folder / FOLDER, ends)
        if run_config is not None:
            shutil.copyfile(run_config, folder / RUN_CONFIG)

    _write(target, state, describe, keep_last=keep_last, in_background=in_background)
    return target


def load_checkpoint(
    root: str | Path,
    iteration: int | None = None,
    *,
    model: HiddenStateGPTModel,
    optimizer: MegatronOptimizer | None = None,
    teacher: TeacherWeights | None = None,
    flag: str = "--load",
) -> dict[str, Tensor]:
    """Fill model, optimizer and the teacher's weights in place, on all ranks; returns the extra tensors, on the CPU, on every rank.

    Raises:
        UserError: no such checkpoint, an untrusted or damaged one, or it lacks something that is asked for.
    """
    native = agreed(lambda: NativeCheckpoint(root, iteration=iteration, flag=flag))
    state = sharded_state(model, optimizer, is_loading=True)
    state["teacher"] = teacher.sharded_state() if teacher else {}
    dict_list_map_inplace(without_objects, state)
    agreed(lambda: _check_complete(native, state, flag=flag))
    loaded = load(state, native.folder)
    model.load_state_dict(loaded["model"], strict=not model.adapted)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    for name, tensor in (teacher.weights if teacher else {}).items():
        tensor.copy_(loaded["teacher"][name])
    return _read_extra_tensors(native)


def save_nothing(root: str | Path, iteration: int, in_background: bool = False) -> None:
    """The part of a rank that has none of the model in `save_checkpoint`, which all ranks of the job do together."""
    _write(iteration_folder(Path(root), iteration), {"model": {}, "teacher": {}, "extra": {}}, in_background=in_background)


def load_nothing(root: str | Path, iteration: int) -> None:
    """The same of `load_checkpoint`."""
    hear()  # of a checkpoint that cannot be opened
    hear()  # of one that lacks something
    load({}, iteration_folder(Path(root), iteration))


@dataclass(frozen=True)
class TeacherWeights:
    """Of a teacher, `weights` by name, cut as those of its `model` are on this rank; of any float type."""

    model: HiddenStateGPTModel
    weights: dict[str, Tensor]

    def sharded_state(self) -> dict[str, Any]:
        """In a checkpoint their names begin with `teacher.`."""
        state = sharded_weights(self.model)
        for name, tensor in self.weights.items():
            state[name].key, state[name].data = TEACHER + state[name].key, tensor
            if isinstance(state[name], ShardedTensor):
                state[name].dtype = tensor.dtype
        return {name: state[name] for name in self.weights}


def _write(
    target: Path,
    state: dict[str, Any],
    describe: Callable[[Path], None] = lambda folder: None,
    *,
    keep_last: int | None = None,
    in_background: bool = False,
) -> None:
    """Rank 0 describes. What cannot be done beside training (megatron-core's barriers are over the device's group) is done at once."""
    background.settle()
    needed, strategy = bytes_to_write(state), StagedSave(in_background=in_background)
    check_room(target, needed)

    def stage(folder: Path) -> None:
        with writing(target):
            strategy.stage(state, folder, content=KINDS)
            if dist.get_rank() == 0:
                describe(folder)

    with ExitStack() as begun:
        folder = begun.enter_context(published_by_rank_zero(target, needed, strategy.group, keep_last))
        agreed(lambda: stage(folder), strategy.group)
        rest = begun.pop_all()

    def write_and_publish() -> None:
        with rest:
            strategy.write()

    finish = lambda: agreed(write_and_publish, strategy.group)
    background.begin(finish) if in_background else finish()


@contextmanager
def published_by_rank_zero(target: Path, needed: int, group: dist.ProcessGroup, keep_last: int | None = None) -> Iterator[Path]:
    """`published` for all ranks: rank 0 makes, names and removes the folder, the others write in it; what was written has checksums."""
    first = dist.get_rank() == 0
    with telling_what_is_needed(needed), ExitStack() as begun:
        folder = agreed(lambda: begun.enter_context(published(target) if first else nullcontext(hidden(target))), group)
        yield folder
        write_all_checksums(folder, group)
        wait_for_all(group)
    if first:
        write_latest(target.parent, number_of(target))
        if keep_last:
            remove_older(target.parent, keep_last)


def write_all_checksums(folder: Path, group: dist.ProcessGroup) -> None:
    """Each rank reads its share, rank 0 writes all down."""
    rank, everyone = dist.get_rank(), [{}] * dist.get_world_size()
    mine = agreed(lambda: checksums(folder, rank=rank, ranks=len(everyone)), group)
    dist.all_gather_object(everyone, mine, group=group)
    if rank == 0:
        write_checksums(folder, {name: digest for share in everyone for name, digest in share.items()})


def sharded_state(model: HiddenStateGPTModel, optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    """What megatron-core saves and loads, with the shard of each tensor that this rank holds."""
    weights = sharded_weights(model)
    state = {"model": {key: value for key, value in weights.items() if not is_frozen(value)} if model.adapted else weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=sharding(model))
    return state


def sharded_weights(model: HiddenStateGPTModel) -> dict[str, Any]:
    """The model's, by name."""
    weights = model.sharded_state_dict(metadata=sharding(model))
    if HEAD in weights:
        weights[HEAD].allow_shape_mismatch = True  # padded for another TP size; megatron allows it for embeddings only
    return weights


def sharding(model: HiddenStateGPTModel) -> dict[str, Any]:
    """How megatron-core is to cut what it saves."""
    return {
        "dp_cp_group": model.layout.groups.dp_cp,
        "distrib_optim_sharding_type": OPTIMIZER_SHARDING,
        "distrib_optim_fully_reshardable_mem_efficient": True,  # gathers Adam's state on the host, not on one GPU
    }


def is_frozen(value: Any) -> bool:
    """Whether it is a weight beside which adapters are trained, or what lies with one: the folder of --model has it."""
    return not (isinstance(value, ShardedTensor) and value.data.requires_grad)


def _replicated(name: str, tensor: Tensor) -> ShardedTensor:
    key = (EXTRA if tensor.ndim else SCALAR) + name
    return ShardedTensor.from_rank_offsets(key, torch.atleast_1d(tensor.detach()), replica_id=dist.get_rank())


def _read_extra_tensors(native: NativeCheckpoint) -> dict[str, Tensor]:
    whole = lambda key: native.read(key, tuple(slice(0, size) for size in native.shape(key)))
    extras = {key.removeprefix(SCALAR).removeprefix(EXTRA): whole(key) for key in native.keys if key.startswith(EXTRA)}
    scalars = {key.removeprefix(SCALAR) for key in native.keys if key.startswith(SCALAR)}
    return {name: tensor.view(()) if name in scalars else tensor for name, tensor in extras.items()}


def without_objects(value: Any) -> Any:
    """megatron-core would unpickle a linear layer's extra state, which is None without Transformer Engine: None it is."""
    return LocalNonpersistentObject(None) if isinstance(value, ShardedObject) else value


def _check_complete(native: NativeCheckpoint, state: dict, *, flag: str) -> None:
    missing = sorted({value.key for value in nested_values(state) if isinstance(value, ShardedTensor)} - set(native.keys))
    if any(key.startswith("optimizer.") for key in missing):
        raise UserError(f"{flag} {native.folder}: holds no optimizer state to resume from; start a new run from it with --model")
    if missing:
        raise UserError(f"{flag} {native.folder}: holds no {missing[0]!r}; it belongs to another model or method")


def _describe(
    model: HiddenStateGPTModel, iteration: int, teacher_layout: ParallelLayout | Grid | None, source: ModelFolder
) -> Description:
    return Description(
        iteration=iteration,
        vocab_size=model.hf_config.vocab_size,
        padded_vocab_size=model.vocab_size,
        layout=_sizes(model.layout),
        teacher_layout=teacher_layout and _sizes(teacher_layout),
        adapter=adapter_config(model, source.path) if model.adapted else None,
    )


def _sizes(layout: ParallelLayout | Grid) -> dict[str, int]:
    return layout_dict(layout.tp_size, layout.pp_size, layout.dp_size)
