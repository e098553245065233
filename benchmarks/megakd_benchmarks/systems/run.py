"""The comparison: processes started, losses compared, iterations and responses timed in turn, results shown and kept."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from megakd.config import SystemsConfig
from megakd.errors import UserError
from megakd.runtime.initialize import resolve_dtype
from megakd_benchmarks.measuring import TOLERANCES, check_equal, in_turn
from megakd_benchmarks.report import check_place, machine
from megakd_benchmarks.systems import report
from megakd_benchmarks.systems.turns import Contestant
from megakd_benchmarks.systems.workload import CHECKED, LOSS, Task, make_task, write_models

MAKERS = {  # name: module, class, processes
    "megakd": ("megakd_layouts", "Megakd", 1),
    "megakd-tp2": ("megakd_layouts", "MegakdTP2", 2),
    "megakd-pp2": ("megakd_layouts", "MegakdPP2", 2),
    "megakd-dp2": ("megakd_layouts", "MegakdDP2", 2),
    "transformers": ("transformers_loops", "PaddedLoop", 1),
    "liger": ("transformers_loops", "LigerLoop", 1),
    "trl": ("trl_trainer", "TRL", 1),
    "trl-recompute": ("trl_trainer", "RecomputingTRL", 1),
}
CURVES = {  # what grows: flag, values, systems
    "rows": ("global_batch_size", (8, 16, 32), ("megakd", "trl")),
    "length": ("max_new_tokens", (32, 64, 128, 256), ("megakd", "trl")),
    "vocabulary": ("vocab_size", (50257, 100352, 151936), ("megakd", "trl")),
    "ranks": ("threads", (1, 2), ("megakd", "megakd-tp2", "megakd-pp2", "megakd-dp2")),
}


@dataclass
class Result:
    """What a system took, a number a repetition; peaks are MiB of all its processes."""

    walls: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    generation_walls: list[float] = field(default_factory=list)
    peak_mib: float = 0.0


def run(config: SystemsConfig) -> None:
    """Measure, print, append to the CSV, draw.

    Raises:
        UserError: something does not fit or is not installed, or the systems do not compute the same losses.
    """
    out = report.place(config)
    check_place(out)
    for name in config.systems:
        maker(name)
    here = machine("benchmark_systems.py", report.PACKAGES)
    rows = [here | row for row in report.rows(config, compare(config))]
    print(report.table(rows))
    report.keep(out, rows, rows)
    for curve in config.curves:
        for at in points(config, curve):
            found = [here | row for row in report.rows(at, compare(at), curve=curve)]
            print(report.table(found))
            rows += found
            report.keep(out, found, rows)  # a command that is cut off has kept what it measured
    print(out.with_suffix(".csv"))


def points(config: SystemsConfig, curve: str) -> Iterator[SystemsConfig]:
    """The comparisons that make up a curve."""
    name, values, systems = CURVES[curve]
    for value in values:
        yield replace(config, **{name: value}, systems=systems)


def maker(name: str) -> tuple[type, int]:
    """A system's class and how many processes it has.

    Raises:
        UserError: what it is a system of is not installed.
    """
    module, kind, ranks = MAKERS[name]
    try:
        if name == "liger":
            importlib.import_module("liger_kernel.chunked_loss")
        return getattr(importlib.import_module(f"megakd_benchmarks.systems.{module}"), kind), ranks
    except ModuleNotFoundError as error:
        raise UserError(f"--systems {name} needs {error.name}; pip install trl liger-kernel, or leave it out") from None


def compare(config: SystemsConfig) -> dict[str, Result]:
    """Every system's times over the same batches, once all have got the first ones right."""
    task = make_task(config)
    with tempfile.TemporaryDirectory() as folder:
        write_models(config, task, Path(folder))
        with contestants(config, task, Path(folder)) as systems:
            return _measure(config, task, systems)


@contextmanager
def contestants(config: SystemsConfig, task: Task, models: Path) -> Iterator[list[Contestant]]:
    """Systems whose processes have loaded the models."""
    systems: list[Contestant] = []
    try:
        for name in config.systems:
            make, ranks = maker(name)
            own = replace(config, threads=max(1, config.threads // ranks))
            systems.append(Contestant(name, make, ranks, own, task, models))
        yield systems
    finally:
        for system in systems:
            system.close()


def _measure(config: SystemsConfig, task: Task, systems: Sequence[Contestant]) -> dict[str, Result]:
    results = {system.name: Result() for system in systems}
    tolerance = TOLERANCES[resolve_dtype(config.dtype)]
    for number in range(1, len(task.prompts) + 1):
        losses = {}
        for system in in_turn(systems, number):
            losses[system.name], wall, cpu = system.go()
            if number > CHECKED:
                results[system.name].walls.append(wall)
                results[system.name].cpus.append(cpu)
        if number <= CHECKED:
            check_equal({name: {f"loss/{LOSS}": loss} for name, loss in losses.items()}, tolerance)
        print(f"iteration {number}: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()), flush=True)
    for system in systems:
        results[system.name].peak_mib = system.peak_mib()
    for number in range(len(task.prompts)):
        for system in in_turn([s for s in systems if s.generates], number):
            results[system.name].generation_walls.append(system.go()[1])
    return results
