"""A model's own parallel layout: which ranks share a layer (tp), follow each other (pp) and repeat the model (dp).

One object per model, passed to whoever needs a group, so that a teacher may have another layout than its student. A Grid says which rank
has which place, to all ranks of the job; a ParallelLayout has the process groups of a rank that has a place in it.
Nothing outside this package asks megatron's global parallel_state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megakd.runtime.waiting import waiting

AXES = ("pp", "dp", "tp")  # from the slowest to the fastest, megatron's order: neighbours share a layer, then repeat the model


@dataclass(frozen=True)
class Grid:
    """The places of one model on neighbouring ranks of the job."""

    first: int  # the job's rank that has the first place
    tp_size: int
    pp_size: int
    dp_size: int

    @property
    def size(self) -> int:
        """Its ranks."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def places(self) -> torch.Tensor:
        """The job's ranks by their place, [pp, dp, tp]."""
        return (self.first + torch.arange(self.size)).view(self.pp_size, self.dp_size, self.tp_size)

    def last_stage_rank(self, replica: int, tp_rank: int) -> int:
        """Where a replica's hidden states come out, whole on every tensor-parallel rank."""
        return int(self.places[-1, replica, tp_rank])

    def ranks_along(self, *axes: str) -> list[list[int]]:
        """The job's ranks that differ along these axes alone: one list a group."""
        kept = [i for i, axis in enumerate(AXES) if axis not in axes]
        along = [i for i, axis in enumerate(AXES) if axis in axes]
        sizes = [self.places.shape[i] for i in along]
        return self.places.permute(*kept, *along).reshape(-1, math.prod(sizes)).tolist()


@dataclass(frozen=True)
class ParallelLayout:
    """Process groups of one model, this rank's place in them, and its device."""

    groups: ProcessGroupCollection
    device: torch.device
    host_dp_group: ProcessGroup  # the replicas once more, over gloo: what travels between hosts' memories when a checkpoint is made
    grid: Grid

    @classmethod
    def from_parallel_state(cls) -> ParallelLayout:
        """The layout that `initialize` set up: the student's, and by default the teacher's too."""
        groups = ProcessGroupCollection.use_mpu_process_groups()
        groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
        host = parallel_state.get_data_parallel_group_gloo(with_context_parallel=True)
        return cls(groups, own_device(), host, Grid(0, groups.tp.size(), groups.pp.size(), groups.dp.size()))

    @classmethod
    def over(cls, grid: Grid) -> ParallelLayout | None:
        """A layout beside others. Every rank of the job calls it, for all of them form each group, and has None outside the grid."""
        tp, pp, dp = (form_group(grid.ranks_along(axis)) for axis in ("tp", "pp", "dp"))
        mp, tp_dp, everyone, alone = (form_group(grid.ranks_along(*axes)) for axes in (("pp", "tp"), ("dp", "tp"), AXES, ()))
        ends = form_group([[ranks[0], ranks[-1]] for ranks in grid.ranks_along("pp")]) if grid.pp_size > 1 else alone
        host = form_group(grid.ranks_along("dp"), backend="gloo")
        if tp is None:
            return None
        groups = ProcessGroupCollection(
            tp=tp, pp=pp, dp=dp, mp=mp, cp=alone, ep=alone, embd=ends, pos_embd=alone if pp.rank() == 0 else None,
            tp_cp=tp, tp_ep=tp, expt_tp=tp, tp_ep_pp=mp, tp_dp_cp=tp_dp, dp_cp=dp, expt_dp=dp, intra_dp_cp=dp, intra_expt_dp=dp,
            inter_dist_opt=None, intra_dist_opt=everyone,
        )  # fmt: skip
        return cls(groups, own_device(), host, grid)

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
    def place(self) -> int:
        """This rank's number in its grid."""
        return dist.get_rank() - self.grid.first

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


def form_group(lists: Sequence[Sequence[int]], backend: str | None = None) -> ProcessGroup | None:
    """A group for each list of ranks, the one with this rank in it. Every rank of the job calls it."""
    groups = [(dist.new_group(list(ranks), backend=backend, timeout=waiting.timeout), ranks) for ranks in lists]
    return next((group for group, ranks in groups if dist.get_rank() in ranks), None)


def own_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
