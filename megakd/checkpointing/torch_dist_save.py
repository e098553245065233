"""megatron-core's torch_dist save without its helper processes.

Upstream writes through a spawned `multiprocessing.Manager`, which imports the main script a second time, and forks a writer per
file. Saving here is synchronous anyway, so torch's own writer does it in this process; the files are the same.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)


class Writer(dcp.FileSystemWriter):
    """One file a rank, flushed to disk; its index names no path of this machine."""

    def storage_meta(self) -> None:
        """None: torch would store the folder's path, which a copy of the checkpoint no longer has."""
        return None


class SynchronousSave(SaveShardedStrategy):
    """Each rank writes the shards of which it is the main replica."""

    def __init__(self):
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """From all ranks at once, each into a file of its own."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        dcp.save(mcore_to_pyt_state_dict(by_key), storage_writer=Writer(checkpoint_dir), planner=planner)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """megatron-core would write extra states to files of their own otherwise; here they go with the tensors."""
        return True
