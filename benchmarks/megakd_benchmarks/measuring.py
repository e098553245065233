"""Seconds, memory and losses of systems that do the same work. What is wrong is not timed.

A system has `name`, `time` (a Stopwatch), `counter` (a PositionCounter), `iterate(batch, iteration)`, which gives losses, and
`generate(batch)`. Systems take turns within each repetition, every other time in reverse, so that load that comes and goes meets both.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megakd.config import BenchmarkConfig
from megakd.data.batch import Sample
from megakd.errors import UserError
from megakd.reporting.logger import RunLogger
from megakd.reporting.stopwatch import now
from megakd.runtime.initialize import is_rank_zero
from megakd_benchmarks.workload import Workload, positions

PARTS = ("rollout", "teacher", "prompt_step", "student_step", "optimizer", "logging", "other")
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative, of losses
MIB = 2**20


@dataclass(frozen=True)
class Timed:
    """One repetition. On a busy machine `cpu` says more than `wall`; both are seconds."""

    wall: float
    cpu: float  # of all threads of this process
    tokens: int  # real input positions of an iteration, or tokens written
    parts: dict[str, float] = field(default_factory=dict)
    real_share: float = math.nan

    @property
    def tokens_per_second(self) -> float:
        """By the wall clock."""
        return self.tokens / self.wall


def timed(work: Callable[[], object]) -> tuple[object, float, float]:
    """What it returned, wall seconds, CPU seconds."""
    cpu, start = time.process_time(), now()
    result = work()
    return result, now() - start, time.process_time() - cpu


def iteration(system, batch: Sequence[Sample], number: int, logger: RunLogger) -> tuple[dict[str, float], Timed]:
    """Losses and time of one iteration, logged as a run logs it."""

    def work() -> dict[str, float]:
        losses = system.iterate(batch, number)
        with system.time("logging"):
            logger.log(number, losses)
        return losses

    losses, wall, cpu = timed(work)
    parts = {name.removeprefix("time/"): seconds for name, seconds in system.time.take().items()}
    parts |= {"other": wall - sum(parts.values())}
    parts = {name: parts.get(name, 0.0) for name in PARTS}
    return losses, Timed(wall, cpu, positions(batch), parts, system.counter.share(batch))


def iterations(systems: Sequence, workload: Workload, folder: Path, dtype: torch.dtype) -> dict[str, list[Timed]]:
    """Every system's iterations over the same batches, once all of them have got the first one right.

    Raises:
        UserError: losses differ; nothing was timed, or what was timed is thrown away.
    """
    loggers = {
        s.name: RunLogger(folder / s.name, total_iterations=0, enabled=is_rank_zero(), log_interval=10**9) for s in systems
    }
    results: dict[str, list[Timed]] = {system.name: [] for system in systems}
    for number, batch in enumerate(workload.batches, start=1):
        losses = {}
        for system in in_turn(systems, number):
            losses[system.name], measured = iteration(system, batch, number, loggers[system.name])
            if number > 1:  # the first is the check, and warms up
                results[system.name].append(measured)
        check_equal(losses, TOLERANCES[dtype])
        _report_progress(number, losses, {name: times[-1].wall for name, times in results.items() if times})
    return results


def in_turn(systems: Sequence, number: int) -> Sequence:
    """As given for odd numbers, in reverse for even ones."""
    return systems if number % 2 else systems[::-1]


def check_equal(losses: dict[str, dict[str, float]], tolerance: float) -> None:
    """Refuse systems whose losses differ by more than `tolerance` of their size.

    Raises:
        UserError: which loss, and what each system made of it.
    """
    (first, ours), *others = losses.items()
    for name, theirs in others:
        for loss in (key for key in theirs if key.startswith("loss/")):
            value = theirs[loss]
            if not math.isclose(ours[loss], value, rel_tol=tolerance, abs_tol=1e-9):
                raise UserError(
                    f"{loss} is {ours[loss]:.6g} in {first} and {value:.6g} in {name}: not the same work, so it is not timed"
                )


def _report_progress(number: int, losses: dict[str, dict[str, float]], seconds: dict[str, float]) -> None:
    if is_rank_zero():
        kl = ", ".join(f"{name} {values['loss/reverse_kl']:.6f}" for name, values in losses.items())
        walls = ", ".join(f"{name} {wall:.2f} s" for name, wall in seconds.items()) or "not timed"
        print(f"iteration {number}: KL(q‖p) {kl}; {walls}", flush=True)


def generations(systems: Sequence, workload: Workload) -> dict[str, list[Timed]]:
    """Responses to all prompts of a global batch, and nothing else."""
    results: dict[str, list[Timed]] = {system.name: [] for system in systems}
    for number, batch in enumerate(workload.batches[1:]):
        for system in in_turn(systems, number):
            responses, wall, cpu = timed(lambda system=system, batch=batch: system.generate(batch))
            results[system.name].append(Timed(wall, cpu, sum(len(row.response) for row in batch)))
            assert len(responses) <= len(batch)
    return results


def median_ratio(theirs: Sequence[Timed], ours: Sequence[Timed], clock: str) -> float:
    """The median over pairs of how many times longer theirs took."""
    return statistics.median(getattr(a, clock) / getattr(b, clock) for a, b in zip(theirs, ours))


# ---- memory


def peak_in_own_process(make: Callable, config: BenchmarkConfig, workload: Workload, models: Path) -> int:
    """Bytes that a system needs at its worst: in a fresh process that has nothing else, beyond what its imports take."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, make, config, workload, models).result()


def peak_memory(make: Callable, config: BenchmarkConfig, workload: Workload, models: Path) -> int:
    """An iteration of one micro-batch, after which the optimizer has its moments, and one of a whole batch."""
    os.environ.pop("MASTER_PORT", None)  # the parent's
    if config.threads:
        torch.set_num_threads(config.threads)
    before = memory("VmRSS")
    system = make(config, workload, models)
    for number, batch in enumerate((workload.first[: config.micro_batch_size], workload.batches[-1]), start=1):
        system.iterate(batch, number)
    return memory("VmHWM") - before


def memory(field: str) -> int:
    """Bytes of this process now (VmRSS) or at its worst (VmHWM); on a GPU those of torch's allocator."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage would tell of the parent's peak as well
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
