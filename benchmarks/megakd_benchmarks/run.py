"""A whole benchmark: models written, systems built, checked and measured, results shown and kept."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megakd.config import BenchmarkConfig
from megakd.errors import file_errors
from megakd.loading import start
from megakd.runtime.initialize import is_rank_zero, resolve_dtype
from megakd_benchmarks import report
from megakd_benchmarks.generation_parts import report_parts
from megakd_benchmarks.measuring import MIB, Timed, generations, iterations, memory, peak_in_own_process
from megakd_benchmarks.megakd_system import MegakdSystem
from megakd_benchmarks.workload import Workload, flops_of_iteration, make_workload, model_configs, write_models

Makers = dict[str, Callable]  # name: (config, workload, folder of models) -> system


def run(config: BenchmarkConfig) -> None:
    """Measure, print, append to the CSV, draw.

    Raises:
        UserError: something does not fit, or the systems do not compute the same losses.
    """
    report.check_place(report.place(config))
    if config.threads:
        torch.set_num_threads(config.threads)
    start(config.parallel, seed=config.seed)
    here, workload = report.machine(), make_workload(config)
    with model_folder(config, workload) as folder:
        rows = [here | report.what_ran(config, workload.source) | row for row in measure(config, workload, folder)]
    if is_rank_zero() and config.measure != ("generation_parts",):  # a table alone: no line for the CSV
        _keep(config, rows)


def measure(config: BenchmarkConfig, workload: Workload, folder: Path) -> list[report.Row]:
    """One row of numbers a system."""
    makers, wanted = _systems_of(config), config.measure
    before = memory("VmRSS")
    peaks = compare_peaks(makers, config, workload, folder) if "memory" in wanted and len(makers) > 1 else {}
    systems = [make(config, workload, folder) for make in makers.values()]
    times = iterations(systems, workload, folder, resolve_dtype(config.dtype)) if "iteration" in wanted else {}
    written = generations(systems, workload) if "generation" in wanted else {}
    if "generation_parts" in wanted:
        tell_parts(report_parts(systems[0], workload))
    if "memory" in wanted and not peaks:
        peaks = {system.name: highest(memory("VmHWM") - before) / MIB for system in systems}
    return _as_rows(list(makers), times, written, peaks, needed_flops(config, workload))


def tell_parts(table: str) -> None:
    """All ranks have measured; the first one's numbers are shown."""
    if is_rank_zero():
        print(table, flush=True)


def _as_rows(
    names: list[str], times: dict[str, list[Timed]], written: dict[str, list[Timed]], peaks: dict[str, float], flops: list[float]
):
    rows = []
    for name in names:
        columns = report.iteration_columns(times.get(name, ()), flops) | report.generation_columns(written.get(name, ()))
        rows.append({"system": name, **columns, **({"peak_mib": peaks[name]} if peaks else {})})
    if len(names) > 1:
        rows[-1] |= report.ratio_columns(names, times, written, peaks)
    return rows


def _systems_of(config: BenchmarkConfig) -> Makers:
    makers: Makers = {MegakdSystem.name: MegakdSystem}
    if config.baseline == "hf":
        from megakd_benchmarks.hf_system import HFSystem  # PEFT takes seconds to import

        makers[HFSystem.name] = HFSystem
    return makers


def compare_peaks(makers: Makers, config: BenchmarkConfig, workload: Workload, folder: Path) -> dict[str, float]:
    """MiB of each system on its own."""
    return {name: peak_in_own_process(make, config, workload, folder) / MIB for name, make in makers.items()}


def needed_flops(config: BenchmarkConfig, workload: Workload) -> list[float]:
    """Of each measured iteration."""
    configs = model_configs(config, workload)
    return [flops_of_iteration(configs, batch) for batch in workload.batches[1:]]


def highest(value: float) -> float:
    """The most of all ranks."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return max(everyone)


@contextmanager
def model_folder(config: BenchmarkConfig, workload: Workload) -> Iterator[Path]:
    """A folder with the models, written by rank 0 for all ranks of this machine, gone when all are done."""
    with tempfile.TemporaryDirectory() as own:
        if is_rank_zero():
            write_models(model_configs(config, workload), Path(own))
        shared = [own]
        dist.broadcast_object_list(shared)
        yield Path(shared[0])
        dist.barrier()


def _keep(config: BenchmarkConfig, rows: list[report.Row]) -> None:
    out = report.place(config)
    print(report.table(rows))
    with file_errors(out, flag="--out"):
        report.append(out.with_suffix(".csv"), rows)
        if "iteration" in config.measure:
            report.draw(out.with_suffix(".png"), rows)
    print(f"{out.with_suffix('.csv')}")
