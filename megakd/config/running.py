"""How a run ends before its last iteration, and how it goes on: nothing here decides a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config.fields import POSITIVE, flag


@dataclass(frozen=True, kw_only=True)
class RunningConfig:
    """A job among others: signals, limits of time, restarts."""

    exit_duration_in_mins: float | None = flag(
        None, "finish the iteration, save and end when the job has run so many minutes; the same command goes on", range=POSITIVE
    )
    exit_signal: Literal["SIGUSR1", "SIGUSR2", "SIGHUP"] = flag(
        "SIGUSR1", "what asks a run to save and end, beside SIGTERM and SIGINT; a second signal ends it at once"
    )
