"""megatron-core's torch_dist format, written and read without its helper processes and without executing a pickle.

Upstream writes through a spawned `multiprocessing.Manager`, which imports the main script a second time, and forks a writer per
file. torch's own writer does it in this process, at once or in a thread beside training; the files are the same, with every
megatron-core: 0.19 would put what is no tensor among the tensors, as a pickle; here it stays in common.pt.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

from megakd.checkpointing.native import COMMON
from megakd.checkpointing.publish import system_errors
from megakd.checkpointing.torch_dist_writer import write_common
from megakd.errors import UserError, file_errors
from megakd.runtime.waiting import background_group, patient_group


class Writer(dcp.FileSystemWriter):
    """One file a rank, flushed to disk; its index names no path of this machine."""

    def storage_meta(self) -> None:
        """None: torch would store the folder's path, which a copy of the checkpoint no longer has."""
        return None

    def write_data(self, plan, planner):
        """As torch's, with the folder's name in what the system says."""
        with file_errors(self.path), system_errors():
            return super().write_data(plan, planner)

    def finish(self, metadata, results):
        """The index."""
        with file_errors(self.path), system_errors():
            super().finish(metadata, results)


class StagedSave:
    """Each rank writes the shards of which it is the main replica, in two steps: `stage` writes what is small and notes the rest, `write`
    writes it. In between training may go on where `in_background` has copied it, into the host's memory."""

    def __init__(self, *, in_background: bool = False):
        self.in_background, self.group = in_background, background_group() if in_background else patient_group()
        self.folder, self.noted = Path(), {}

    def stage(self, state: ShardedStateDict, folder: Path, *, content: dict[str, Any]) -> None:
        """From all ranks at once; `content` says what the state is, as megatron-core's `content_metadata`."""
        shards, common = save_preprocess(state | {"content_metadata": content})
        if dist.get_rank() == 0:
            write_common(common, folder)
            save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
        for shard in (shard for shards in by_key.values() for shard in shards if self.in_background and isinstance(shard, ShardedTensor)):
            shard.data = shard.data.detach().to("cpu", copy=True)
        self.folder, self.noted = folder, mcore_to_pyt_state_dict(by_key)

    def write(self) -> None:
        """From all ranks at once, each into a file of its own.

        Raises:
            UserError: on all of them, where one could not write.
        """
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        noted, self.noted = self.noted, {}
        try:
            dcp.save(noted, storage_writer=Writer(self.folder), planner=planner, process_group=self.group)
        except dcp.api.CheckpointException as error:
            told = [failure for failure, _traceback in error.failures.values() if isinstance(failure, UserError)]
            if not told:
                raise
            raise told[0] from None


def load(state: ShardedStateDict, folder: Path) -> StateDict:
    """What `state` asks for, and what common.pt holds, from all ranks at once.

    Raises:
        UserError: common.pt is damaged, or holds more than it should.
    """
    loaded = load_common(folder)
    shards, own, factories = load_preprocess(state)
    shards, _ = extract_sharded_base(shards)
    validate_sharding_integrity(determine_global_metadata(shards)[1])
    merge(loaded, own)
    merge(loaded, TorchDistLoadShardedStrategy().load(shards, folder))
    return apply_factory_merges(loaded, factories)


def load_common(folder: Path) -> StateDict:
    """Numbers and names only, read as such whatever torch's environment variables say.

    Raises:
        UserError: damaged, or there is more in it.
    """
    file = folder / COMMON
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(f"{file}: damaged, or holds more than numbers and names; copy the checkpoint again, or do not trust it") from error
