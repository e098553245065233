"""Told to stop: by a signal to any rank, by the end of whoever started the ranks, or by the clock. The ranks agree once an iteration.

The first signal is a request, a later one ends the process at once. Both are noticed by a thread, from a pipe into which Python's own
handler writes: the main thread may be waiting inside a collective for a rank that has died, and would hear of nothing. Whether a launcher
lives is asked of the system: whose child this process is now, and whose it was when it began (megakd.STARTED_BY).
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

import megakd
from megakd.errors import tell
from megakd.runtime.waiting import host_group

ALWAYS = ("SIGTERM", "SIGINT")
TOGETHER = 2.0  # seconds: schedulers signal all processes of a job, and the launcher among them hands its own on: that is one request
ORPHANED, CLOCK = 64, 65  # reasons beyond the numbers of signals
PATROL = 2.0  # seconds between looks for the parent


class Requests:
    """What has arrived at this process: 0, or the reason to stop, and since when."""

    def __init__(self):
        self.reason, self.since, self.deadline = 0, 0.0, float("inf")
        self.signals: set[int] = set()  # those that are requests
        self.is_lost: Callable[[], bool] = lambda: True  # whether a rank that this one waits for may be gone: until all have met

    def note(self, reason: int) -> None:
        """A signal, or what counts as one.

        A job that has lost a rank, or is not complete yet, cannot finish an iteration: there is nothing to wait for.
        """
        if self.reason and time.monotonic() - self.since < TOGETHER:
            return
        if self.reason or self.is_lost():
            os._exit(128 + reason)
        self.reason, self.since = reason, time.monotonic()
        tell(f"{name_of(reason)}: the iteration is finished and saved first; a second signal ends at once")

    def now(self) -> int:
        """The reason to stop, the clock included."""
        return self.reason or (CLOCK if time.monotonic() > self.deadline else 0)


def name_of(reason: int) -> str:
    """As a message says it."""
    return {ORPHANED: "the end of its launcher", CLOCK: "--exit-duration-in-mins"}.get(reason) or signal.Signals(reason).name


requests = Requests()  # of this process, as its signal handlers are


def listen(names: Sequence[str]) -> None:
    """Let these signals and ALWAYS be requests from now on. Called by a program that owns its process, from its main thread."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for name in dict.fromkeys((*ALWAYS, *names)):
        requests.signals.add(signal.Signals[name])
        signal.signal(signal.Signals[name], lambda number, frame: None)  # the byte in the pipe says it
    threading.Thread(target=_watch, args=(reader, megakd.STARTED_BY), daemon=True, name="signals").start()


def _watch(reader: int, parent: int) -> None:
    has_launcher = "TORCHELASTIC_RUN_ID" in os.environ
    while True:
        ready, _, _ = select.select([reader], [], [], PATROL)
        for number in os.read(reader, 64) if ready else ():
            if number in requests.signals:
                requests.note(number)
        if has_launcher and os.getppid() != parent:
            has_launcher = False
            requests.note(ORPHANED)


def stop_after(minutes: float | None) -> None:
    """Set the clock of this process; None: no limit."""
    requests.deadline = time.monotonic() + 60 * minutes if minutes else float("inf")


def agree_to_stop() -> int:
    """The reason that any rank of the job has to stop, on all of them; 0 where none has. Every rank calls it.

    One number, over hosts' memories: no device is waited for.
    """
    reason = torch.tensor(requests.now(), dtype=torch.int32)
    dist.all_reduce(reason, dist.ReduceOp.MAX, group=host_group())
    return int(reason)
