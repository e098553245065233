"""The other ranks as processes: which of them, on this host, are gone or stand still."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megakd.errors import LostRankError
from megakd.runtime.stop import requests
from megakd.runtime.waiting import host_group, waiting

CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Read error", "Write error")  # as gloo says it
PATIENCE = 2.0  # seconds
GO_ON = "the same command continues from the last checkpoint"


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

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What a collective says of a rank that is lost becomes one line that names it.

        Raises:
            LostRankError: another rank has ended, or does not answer.
        """
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            is_timeout = "imed out" in str(error) or "imeout" in str(error)
            if not (is_timeout or any(word in str(error) for word in CLOSED)):
                raise
            where = f"rank {dist.get_rank()} waited in {collective_of(error)}"
            raise LostRankError(f"{self._lost(is_timeout)}, while {where}; {GO_ON}") from error

    def _lost(self, is_timeout: bool) -> str:
        """Who it is, as far as this host can see; a process takes a moment to end."""
        end = time.monotonic() + (0 if is_timeout else PATIENCE)
        while not (gone := self.gone()) and time.monotonic() < end:
            time.sleep(0.05)
        for ranks, what in ((gone, "has ended"), (self.stopped(), f"stands still, for {waiting.timeout} (--timeout-minutes)")):
            if ranks:
                host, pid = self.places[ranks[0]]
                return f"rank {ranks[0]} (process {pid} on {host}) {what}"
        return f"a rank has not answered for {waiting.timeout} (--timeout-minutes)" if is_timeout else "a rank on another host has ended"

    def stopped(self) -> list[int]:
        """Ranks on this host that somebody has suspended."""
        return [rank for rank, state in self.states().items() if state in "Tt"]


def collective_of(error: BaseException) -> str:
    """The function of torch.distributed that raised it."""
    trace, name = error.__traceback__, "a collective"
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d":
            name = trace.tb_frame.f_code.co_name
            break
        trace = trace.tb_next
    return name


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
