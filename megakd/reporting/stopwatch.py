"""Seconds of each part of an iteration."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager

import torch


class Stopwatch:
    """`with stopwatch("rollout"): ...` adds to `time/rollout`; on a GPU it waits for the work that was asked for."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str):
        start = now()
        yield
        self._seconds[part] += now() - start

    def take(self) -> dict[str, float]:
        """`time/<part>` in seconds since the last call, in the order of their first use."""
        taken = {f"time/{part}": seconds for part, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


def now() -> float:
    """Seconds of a clock, read when the GPU has done all that it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
