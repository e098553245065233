"""The numbers of a run: progress line, metrics.jsonl, TensorBoard, wandb where it is asked for. And samples.jsonl: what the student writes.

    iteration   120/5000 | loss/reverse_kl 0.4127 | grad_norm 0.91 | lr 4.8e-06 | 38,412 tok/s | rollout 1.20 s | ETA 1:05:12

Names say how a number is printed: loss/*, valid/*, grad_norm, lr, tokens_per_second, memory_gib, time/* (seconds).
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from megakd.errors import file_errors
from megakd.reporting.jsonl import JsonLines
from megakd.reporting.wandb_run import WandbRun

FORMATS = {  # by the name before its slash
    "loss": "{name} {value:.4f}",
    "valid": "{name} {value:.4f}",
    "grad_norm": "{name} {value:.2f}",
    "lr": "{name} {value:.1e}",
    "tokens_per_second": "{value:,.0f} tok/s",
    "real_share": "{value:.0%} real",
    "memory_gib": "{value:.1f} GiB",
    "time": "{last} {value:.2f} s",
}
OTHER = "{name} {value:.4g}"
ONLY_IN_FILES = ("tokens", "positions")


class RunLogger:
    """Writes into `folder` where `enabled` (one rank of the run), does nothing elsewhere.

    A run resumed from the checkpoint of `resumed_iteration` continues its files: what an earlier attempt wrote after that
    iteration is removed, so that every iteration stands there once. None starts the files afresh.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        total_iterations: int,
        enabled: bool,
        resumed_iteration: int | None = None,
        log_interval: int = 1,
        eval_interval: int | None = None,
        wandb: WandbRun | None = None,
    ) -> None:
        self.total_iterations = total_iterations
        self.enabled, self._wandb = enabled, wandb
        self.log_interval = log_interval
        self.eval_interval = eval_interval or total_iterations
        self._iterations: deque[float] = deque(maxlen=50)  # seconds
        self._evaluations: deque[float] = deque(maxlen=50)
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # a second of imports, for one rank only

        folder = Path(folder)
        first = 0 if resumed_iteration is None else resumed_iteration + 1
        self._metrics = JsonLines(folder / "metrics.jsonl", resumed_iteration=resumed_iteration)
        self._samples = JsonLines(folder / "samples.jsonl", resumed_iteration=resumed_iteration)
        with file_errors(folder / "tensorboard"):
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        self._last_time = time.perf_counter()  # of the last log

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Once an iteration, when it is done; iterations count from 1, and 0 is the state before training."""
        if not self.enabled:
            return
        self._metrics.append(iteration, metrics)
        with file_errors(self._tensorboard.log_dir):
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, iteration)
        held_out = any(name.startswith("valid/") for name in metrics)
        if self._wandb:
            self._wandb.log(iteration, metrics)
        eta = self._eta(iteration, self._evaluations if held_out else self._iterations)
        if held_out or iteration % self.log_interval == 0 or iteration == self.total_iterations:
            print(progress_line(iteration, self.total_iterations, metrics, eta), flush=True)

    def log_samples(self, iteration: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """One line a sample: what was asked, written and expected."""
        if self.enabled:
            for sample in samples:
                self._samples.append(iteration, sample)

    def close(self) -> None:
        """TensorBoard's last events are written only now."""
        if self.enabled:
            self._metrics.close()
            self._samples.close()
            with file_errors(self._tensorboard.log_dir):
                self._tensorboard.close()
            if self._wandb:
                self._wandb.close()

    def _eta(self, iteration: int, kind: deque[float]) -> float | None:
        """Seconds to go: iterations and evaluations still to come, each by the median of its own kind. None before the first iteration."""
        now = time.perf_counter()
        kind.append(now - self._last_time)
        self._last_time = now
        if not self._iterations:
            return None
        seconds = statistics.median(self._iterations) * (self.total_iterations - iteration)
        if self._evaluations:
            seconds += statistics.median(self._evaluations) * self._evaluations_after(iteration, kind is self._evaluations)
        return seconds

    def _evaluations_after(self, iteration: int, evaluated: bool) -> int:
        """One every `eval_interval` iterations and one at the end; `evaluated`: this iteration has had its own."""
        due = math.ceil(self.total_iterations / self.eval_interval) - math.ceil(iteration / self.eval_interval)
        return due if evaluated else due + 1


def progress_line(iteration: int, total_iterations: int, metrics: Mapping[str, float], eta_seconds: float | None) -> str:
    """As in the example above; without ETA where `eta_seconds` is None."""
    width = len(str(total_iterations))
    parts = [f"iteration {iteration:{width}d}/{total_iterations}"]
    for name, value in metrics.items():
        if name not in ONLY_IN_FILES:
            parts.append(FORMATS.get(name.split("/")[0], OTHER).format(name=name, value=value, last=name.split("/")[-1]))
    if eta_seconds is not None:
        parts.append(f"ETA {timedelta(seconds=round(eta_seconds))}")
    return " | ".join(parts)
