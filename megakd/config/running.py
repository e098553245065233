"""How a run ends before its last iteration, and how it goes on: nothing here decides a result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megakd.config.fields import POSITIVE, flag


@dataclass(frozen=True, kw_only=True)
class RunningConfig:
    """A job among others: signals, limits of time, restarts."""

    resume: str = flag("latest", "which checkpoint of --save a run continues from: latest, previous, or the number of an iteration")
    on_nonfinite: Literal["stop", "skip"] = flag(
        "stop", "when a loss or a gradient is NaN or infinite: end before the step is taken, or leave the step out and go on"
    )
    timeout_minutes: float = flag(
        10.0, "how long a rank waits for another that stands still; one that has ended is noticed at once", range=POSITIVE
    )
    exit_duration_in_mins: float | None = flag(
        None, "finish the iteration, save and end when the job has run so many minutes; the same command goes on", range=POSITIVE
    )
    exit_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] = flag(
        "SIGUSR1", "what asks a run to save and end, beside SIGTERM and SIGINT; a second signal ends it at once"
    )

    def validation_errors(self) -> Iterator[str]:
        """What is wrong, one line each."""
        if self.resume not in ("latest", "previous") and not (self.resume.isdecimal() and self.resume.isascii() and len(self.resume) < 8):
            yield f"--resume {self.resume} is no iteration; give latest, previous, or a number"
