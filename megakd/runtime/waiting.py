"""How long a rank waits for another: --timeout-minutes in a collective, long where one rank alone may have hours of work.

A rank that has ended is noticed at once, for its connections close; the timeout is for one that stands still. What all wait for on rank 0
(an export, a checkpoint's files, data being read) goes over a group of its own, `patient`.
"""

from __future__ import annotations

import datetime

import torch.distributed as dist

PATIENCE = datetime.timedelta(hours=12)
USUAL_MINUTES = 10.0


class Waiting:
    """The timeout of collectives, and the groups over hosts' memories that serve all ranks of a world, formed when first asked for."""

    def __init__(self):
        self.timeout = datetime.timedelta(minutes=USUAL_MINUTES)
        self._world: dist.ProcessGroup | None = None
        self._groups: dict[str, dist.ProcessGroup] = {}

    def group(self, name: str, timeout: datetime.timedelta) -> dist.ProcessGroup:
        """All ranks of the job, over gloo; all of them ask for it together the first time."""
        if self._world is not dist.group.WORLD:
            self._world, self._groups = dist.group.WORLD, {}
        if name not in self._groups:
            self._groups[name] = dist.new_group(backend="gloo", timeout=timeout)
        return self._groups[name]


waiting = Waiting()  # of this process


def set_timeout(minutes: float) -> None:
    """For groups that are formed from now on."""
    waiting.timeout = datetime.timedelta(minutes=minutes)


def host_group() -> dist.ProcessGroup:
    """All ranks of the job, over gloo; with our timeout also where somebody else has joined the ranks."""
    return waiting.group("host", waiting.timeout)


def patient_group() -> dist.ProcessGroup:
    """The same, for what may take one rank hours."""
    return waiting.group("patient", PATIENCE)


def request_group() -> dist.ProcessGroup:
    """The same, for ranks that wait to be asked: what others do meanwhile over the patient one is none of theirs."""
    return waiting.group("requests", PATIENCE)


def background_group() -> dist.ProcessGroup:
    """The same, for what goes on beside training."""
    return waiting.group("background", PATIENCE)


def wait_for_all(group: dist.ProcessGroup | None = None) -> None:
    """A barrier of all ranks, however long one of them takes."""
    dist.barrier(group=group or patient_group())
