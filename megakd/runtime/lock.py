"""One folder, one run: a file in it names who is at work.

    .megakd.lock    {"host": "node7", "process": 4711, "started": 8231, "since": "2026-01-31 12:00:00", "job": "slurm 99"}

A lock whose process has ended on this host, or which an earlier attempt of the same job has left on another, is taken over.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megakd.errors import UserError, file_errors
from megakd.reporting.own_folder import missing_parents, remove_empty
from megakd.runtime.initialize import on_rank_zero
from megakd.runtime.peers import state_of

LOCK = ".megakd.lock"


@dataclass(frozen=True)
class Holder:
    """A process, so that it is told from a later one of the same number."""

    host: str
    process: int
    started: int  # clock ticks after the host's start
    since: str
    job: str = ""

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, start_of(pid), time.strftime("%Y-%m-%d %H:%M:%S"), job_of_this())

    @classmethod
    def read(cls, text: str) -> Holder | None:
        """None of an empty or damaged file: whoever wrote it was killed meanwhile."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    def is_at_work(self, me: Holder) -> bool:
        """As far as this host can know."""
        if self.host != me.host:
            return not (self.job and self.job == me.job)
        return self.process != me.process and state_of(self.process) not in "XZ" and start_of(self.process) == self.started


@contextmanager
def locked(folder: Path, *, flag: str = "--save") -> Iterator[None]:
    """The folder is this run's for the block. Every rank enters, rank 0 holds it.

    Raises:
        UserError: another run has it; on every rank, where they have met.
    """
    me, made = Holder.this(), missing_parents(folder / LOCK)
    if dist.is_initialized():
        on_rank_zero(lambda: take(folder, me, flag))
    elif os.environ.get("RANK", "0") == "0":
        take(folder, me, flag)
    try:
        yield
    finally:
        release(folder, me)
        if os.environ.get("RANK", "0") == "0":
            remove_empty(made)


def take(folder: Path, me: Holder, flag: str) -> None:
    """
    Raises:
        UserError: another run is at work in it.
    """
    with file_errors(folder, flag=flag):
        folder.mkdir(parents=True, exist_ok=True)
        while not _taken(folder, me, flag):
            continue


def _taken(folder: Path, me: Holder, flag: str) -> bool:
    """False where the file has been removed meanwhile."""
    file = folder / LOCK
    with file.open("a+", encoding="utf-8") as stream:
        with suppress(OSError):  # a network's file system without locks: two runs that start in the same moment are not told apart
            fcntl.flock(stream, fcntl.LOCK_EX)
        if not (file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat())):
            return False
        stream.seek(0)
        holder = Holder.read(stream.read())
        if holder and holder.is_at_work(me):
            raise UserError(
                f"{flag} {folder}: process {holder.process} on {holder.host} has been at work in it since {holder.since}; let it end, "
                f"remove {file} if it has ended already, or give another {flag}"
            )
        stream.truncate(0)
        stream.write(json.dumps(asdict(me)) + "\n")
        return True


def release(folder: Path, me: Holder) -> None:
    """If it is ours."""
    with suppress(OSError):
        if Holder.read((folder / LOCK).read_text(encoding="utf-8")) == me:
            (folder / LOCK).unlink()


def start_of(pid: int) -> int:
    """When a process began; 0 where the system does not say, or there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return 0


def job_of_this() -> str:
    """What all attempts of a job have in common; nothing where no scheduler and no launcher says it."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {job} {os.environ.get('SLURM_ARRAY_TASK_ID', '')}".strip()
    launcher = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if launcher == "none" else f"torchrun {launcher}"
