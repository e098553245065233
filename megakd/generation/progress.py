"""How far an evaluation is, and how long it will take: a line every few seconds on rank 0."""

from __future__ import annotations

import time
from datetime import timedelta

from megakd.runtime.initialize import is_rank_zero

SECONDS_BETWEEN_LINES = 5


class Progress:
    """Counts responses up to `total`."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.started = time.perf_counter()
        self._last_line = self.started

    def advance(self, count: int, what: str) -> None:
        """`what`: what is being answered."""
        self.done += count
        now = time.perf_counter()
        if is_rank_zero() and (self.done == self.total or now - self._last_line >= SECONDS_BETWEEN_LINES):
            self._last_line = now
            print(self.line(what, now - self.started), flush=True)

    def line(self, what: str, seconds: float) -> str:
        """Rate and ETA by the mean of all responses so far, which took `seconds`."""
        rate = self.done / seconds
        left = timedelta(seconds=round((self.total - self.done) / rate))
        return f"responses {self.done:{len(str(self.total))}d}/{self.total} | {what} | {rate:,.1f} responses/s | ETA {left}"
