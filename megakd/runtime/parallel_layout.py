"""A model's own parallel layout: which ranks share a layer (tp), follow each other (pp) and repeat the model (dp).

One object per model, passed to whoever needs a group, so that a teacher may have another layout than its student.
Nothing outside this package asks megatron's global parallel_state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class ParallelLayout:
    """Process groups of one model, this rank's place in them, and its device."""

    groups: ProcessGroupCollection
    device: torch.device
    host_dp_group: ProcessGroup  # the replicas once more, over gloo: what travels between hosts' memories when a checkpoint is made

    @classmethod
    def from_parallel_state(cls) -> ParallelLayout:
        """The layout that `initialize` set up: the student's, and by default the teacher's too."""
        groups = ProcessGroupCollection.use_mpu_process_groups()
        groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
        host = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        return cls(groups, device, host)

    @property
    def tp_group(self) -> ProcessGroup:
        """Ranks that share every layer of one stage."""
        return self.groups.tp

    @property
    def pp_group(self) -> ProcessGroup:
        """Ranks whose stages make one model, first to last."""
        return self.groups.pp

    @property
    def dp_group(self) -> ProcessGroup:
        """Ranks that hold the same weights and read other samples."""
        return self.groups.dp

    @property
    def tp_size(self) -> int:
        """Shards of a layer."""
        return self.tp_group.size()

    @property
    def tp_rank(self) -> int:
        """Which shard of every layer is here."""
        return self.tp_group.rank()

    @property
    def pp_size(self) -> int:
        """Stages of the model."""
        return self.pp_group.size()

    @property
    def pp_rank(self) -> int:
        """Which stage is here."""
        return self.pp_group.rank()

    @property
    def dp_size(self) -> int:
        """Replicas of the model."""
        return self.dp_group.size()

    @property
    def dp_rank(self) -> int:
        """Which replica this is."""
        return self.dp_group.rank()

    @property
    def is_first_stage(self) -> bool:
        """The stage with the embedding: it reads tokens and the soft prompt."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """The stage with the final norm and the output layer: losses and next tokens are made here."""
        return self.pp_rank == self.pp_size - 1

    def stage_global_rank(self, stage: int) -> int:
        """Global rank of pipeline stage `stage` in this rank's pipeline."""
        return dist.get_process_group_ranks(self.pp_group)[stage]

    def broadcast_from_last_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` on every stage with the last stage's."""
        return self.broadcast_from_stage(tensor, self.pp_size - 1)

    def object_from_last_stage(self, value: Any) -> Any:
        """The last stage's object on every stage."""
        if self.pp_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, self.stage_global_rank(self.pp_size - 1), group=self.pp_group, device=self.device)
        return values[0]

    def broadcast_from_first_stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` on every stage with the first stage's."""
        return self.broadcast_from_stage(tensor, 0)

    def broadcast_from_stage(self, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        """Overwrite `tensor` on every stage with that of one."""
        if self.pp_size > 1:
            dist.broadcast(tensor, self.stage_global_rank(stage), group=self.pp_group)
        return tensor

    def sum_over_data_parallel(self, tensor: torch.Tensor) -> torch.Tensor:
        """Overwrite `tensor` on every replica with the sum over replicas."""
        if self.dp_size > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor
