"""Work that goes on beside training, one piece at a time, on all ranks of the job together: in a thread, over a group of its own.

megatron-core's own callers of asynchronous writes ask for a GPU's number in every look (`AsyncCaller.sync_all_async_calls`), and fork
or spawn a process a rank. A thread dies with its rank: nothing writes on into a folder that the next attempt has taken over. While torch
writes and files are digested, Python's lock is mostly free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch
import torch.distributed as dist

from megakd.runtime.waiting import host_group


class Background:
    """What is at work, if anything: begun and settled by all ranks at the same point of their programs."""

    def __init__(self):
        self.outcome: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Let a thread do it. Nothing may be at work."""
        assert self.outcome is None, "settle() comes first"
        self.outcome = Future()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None  # a thread's own, 0 at first
        threading.Thread(target=_do, args=(work, self.outcome, device), daemon=True, name="background").start()

    def settle(self) -> None:
        """Wait for what is at work, and raise what it raised."""
        outcome, self.outcome = self.outcome, None
        if outcome is not None:
            outcome.result()

    def forget(self) -> None:
        """Wait for what an earlier run of this process has left, whatever came of it."""
        outcome, self.outcome = self.outcome, None
        if outcome is not None:
            outcome.exception()

    def look(self) -> None:
        """The same once it has ended on every rank, or gone wrong on one; does not wait before. Every rank of the job calls it."""
        if self.outcome is None:
            return
        done = self.outcome.done()
        state = torch.tensor([not done, done and self.outcome.exception() is not None], dtype=torch.int32)
        dist.all_reduce(state, dist.ReduceOp.MAX, group=host_group())
        is_at_work, has_failed = state.tolist()
        if has_failed or not is_at_work:
            self.settle()


background = Background()  # of this process


def settle() -> None:
    """`background`'s, for whoever calls it on another rank by its name."""
    background.settle()


def look() -> None:
    """The same."""
    background.look()


def _do(work: Callable[[], None], outcome: Future[None], device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)
    try:
        work()
    except BaseException as error:
        outcome.set_exception(error)
    else:
        outcome.set_result(None)
