"""The other ranks as processes: which of them, on this host, are gone or stand still."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megakd.runtime.stop import host_group, requests


@dataclass(frozen=True)
class Peers:
    """Host and process of every rank of the job, rank 0 first."""

    places: tuple[tuple[str, int], ...] = ()

    @classmethod
    def meet(cls) -> Peers:
        """Every rank of the job calls it. A request to stop then asks whether anybody is lost."""
        everyone: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(everyone, (socket.gethostname(), os.getpid()), group=host_group())
        peers = cls(tuple(everyone))
        requests.is_lost = lambda: bool(peers.gone())
        return peers

    def states(self) -> dict[int, str]:
        """Of each rank on this host the letter that the system gives its process; X where there is none any more."""
        here = socket.gethostname()
        return {rank: state_of(pid) for rank, (host, pid) in enumerate(self.places) if host == here}

    def gone(self) -> list[int]:
        """Ranks on this host that have ended."""
        return [rank for rank, state in self.states().items() if state in "XZ"]

    def stopped(self) -> list[int]:
        """Ranks on this host that somebody has suspended."""
        return [rank for rank, state in self.states().items() if state in "Tt"]


def state_of(pid: int) -> str:
    """R, S, D, T (suspended), Z (ended, and not yet asked for), or X where no such process is; S where the system does not say."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self/stat").exists():
        return "S" if is_alive(pid) else "X"
    try:
        return stat.read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_alive(pid: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
