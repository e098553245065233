"""megatron-core's torch_dist save without its helper processes.

Upstream writes through a spawned `multiprocessing.Manager`, which imports the main script a second time, and forks a writer per
file. torch's own writer does it in this process, at once or in a thread beside training; the files are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

from megakd.errors import UserError, file_errors
from megakd.runtime.waiting import background_group, patient_group


class Writer(dcp.FileSystemWriter):
    """One file a rank, flushed to disk; its index names no path of this machine."""

    def storage_meta(self) -> None:
        """None: torch would store the folder's path, which a copy of the checkpoint no longer has."""
        return None

    def write_data(self, plan, planner):
        """As torch's, whose RuntimeError ("unexpected pos 704 vs 598") hides what the system said."""
        with system_errors(Path(self.path)):
            return super().write_data(plan, planner)

    def finish(self, metadata, results):
        """The index."""
        with system_errors(Path(self.path)):
            super().finish(metadata, results)


@contextmanager
def system_errors(folder: Path) -> Iterator[None]:
    """A full disk, and whatever else the system says while a checkpoint is written, in one line.

    Raises:
        UserError: on the rank that met it.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        said: BaseException | None = error
        while said is not None and not isinstance(said, OSError):
            said = said.__cause__ or said.__context__
        if said is None:
            raise
        with file_errors(folder):
            raise said from error


class StagedSave(SaveShardedStrategy):
    """Each rank writes the shards of which it is the main replica, in two steps: megatron-core's `save` notes what is to be written,
    `write` writes it. In between training may go on where `in_background` has copied it, into the host's memory."""

    def __init__(self, *, in_background: bool = False):
        super().__init__("torch_dist", 1)
        self.in_background, self.group = in_background, background_group() if in_background else patient_group()
        self.folder, self.noted = Path(), {}

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path) -> None:
        """Note what this rank has to write."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        for shard in (shard for shards in by_key.values() for shard in shards if self.in_background and isinstance(shard, ShardedTensor)):
            shard.data = shard.data.detach().to("cpu", copy=True)
        self.folder, self.noted = Path(checkpoint_dir), mcore_to_pyt_state_dict(by_key)

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

    @property
    def can_handle_sharded_objects(self) -> bool:
        """megatron-core would write extra states to files of their own otherwise; here they go with the tensors."""
        return True
