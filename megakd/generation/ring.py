"""Pipeline stages as a ring that turns: p groups of rows are under way, one on each stage; after a turn all move one stage on.

    turn      0    1    2    3    4           a, b: groups; a′ is a one token later
    stage 0   a    b    a′   b′   a″
    stage 1        a    b    a′   b′

No stage waits for the sampled token of the group it has just handed on. All messages of a turn are posted together, sends and
receives, so that no order of ranks can lock, under gloo or NCCL. When a group ends, the next waiting one takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megakd.runtime.parallel_layout import ParallelLayout


class Group(Protocol):
    """What goes round: the same group exists on every stage, and each stage can tell what the next message will be."""

    finished: bool

    def buffers(self) -> list[Tensor]:
        """Room for the next message from the stage before."""

    def advance(self, message: list[Tensor]) -> list[Tensor]:
        """This stage's part of the work; returns the message for the next stage."""


Waiting = Iterator[Callable[[], Group]]


def run_pipeline_ring(waiting: Waiting, layout: ParallelLayout) -> None:
    """Run all waiting groups to their end. Every stage is given the same groups in the same order."""
    places = [start(waiting) for _ in range(layout.pp_size)]
    message: list[Tensor] = []
    for place in count(-layout.pp_rank):  # negative while the first group is still on earlier stages
        outgoing = advance(places, place % layout.pp_size, message, waiting) if place >= 0 else []
        coming = places[(place + 1) % layout.pp_size] if place >= -1 else None
        message = exchange(outgoing, coming.buffers() if coming else [], layout)
        if not any(places):
            return


def start(waiting: Waiting) -> Group | None:
    """The next waiting group; None where none is left."""
    make = next(waiting, None)
    return make() if make else None


def advance(places: list[Group | None], place: int, message: list[Tensor], waiting: Waiting) -> list[Tensor]:
    """Work on the group at `place`; the next waiting one follows it there when it has ended."""
    group = places[place]
    if group is None:
        return []
    outgoing = group.advance(message)
    if group.finished:
        places[place] = None  # freed before the next one allocates
        places[place] = start(waiting)
    return outgoing


def exchange(outgoing: list[Tensor], incoming: list[Tensor], layout: ParallelLayout) -> list[Tensor]:
    """Send to the next stage and receive from the one before, all at once; a single stage talks to itself."""
    if layout.pp_size == 1:
        return outgoing
    after, before = (layout.stage_global_rank((layout.pp_rank + step) % layout.pp_size) for step in (1, -1))
    operations = [dist.P2POp(dist.isend, tensor.contiguous(), after, layout.pp_group) for tensor in outgoing]
    operations += [dist.P2POp(dist.irecv, tensor, before, layout.pp_group) for tensor in incoming]
    for request in dist.batch_isend_irecv(operations) if operations else []:
        request.wait()
    return incoming
