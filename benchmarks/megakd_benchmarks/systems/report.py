"""The comparison as a table for people, a line a system in a CSV that grows, and figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megakd.config import SystemsConfig
from megakd.errors import file_errors
from megakd.reporting.plots import draw_bars, draw_lines, new_figure
from megakd_benchmarks.report import ROOT, Row, append

if TYPE_CHECKING:
    from megakd_benchmarks.systems.run import Result

PACKAGES = ("torch", "transformers", "megatron-core", "trl", "liger-kernel")
COLUMNS = {  # column: title, how a number is printed
    "iteration_s": ("iteration", "{:.2f} s"),
    "cpu_s": ("its processor time", "{:.2f} s"),
    "peak_mib": ("peak memory", "{:,.0f} MiB"),
    "generation_tokens_per_s": ("tokens written a second", "{:,.0f}"),
}
SIZES = ("vocab_size", "global_batch_size", "micro_batch_size", "max_new_tokens", "threads")
RATIOS = {"iteration_ratio": "iteration", "cpu_ratio": "processor time", "peak_ratio": "memory", "generation_ratio": "generation"}


def place(config: SystemsConfig) -> Path:
    """--out, or where results of this device are kept; without a suffix."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    return Path(config.out) if config.out else ROOT / "benchmarks" / "results" / f"systems_{kind}"


def rows(config: SystemsConfig, results: Mapping[str, Result], *, curve: str = "") -> list[Row]:
    """One a system: medians over repetitions, and medians of pairs of how many times what the first system takes."""
    what = {name: "×".join(map(str, size)) for name, size in config.sizes.items()}
    what |= {name: getattr(config, name) or "" for name in SIZES}
    tokens = config.global_batch_size * config.max_new_tokens
    first = next(iter(results.values()))
    return [
        {"curve": curve, **what, "system": name, **_columns(result, tokens), **_ratios(result, first)}
        for name, result in results.items()
    ]


def _columns(result: Result, tokens: int) -> Row:
    columns = {
        "repetitions": len(result.walls),
        "iteration_s": statistics.median(result.walls),
        "cpu_s": statistics.median(result.cpus),
        "peak_mib": result.peak_mib,
    }
    written = result.generation_walls
    return columns | ({"generation_tokens_per_s": tokens / statistics.median(written)} if written else {})


def _ratios(result: Result, first: Result) -> Row:
    pairs = {"iteration": "walls", "cpu": "cpus", "generation": "generation_walls"}
    ratios = {"peak_ratio": result.peak_mib / first.peak_mib}
    for name, times in pairs.items():
        if theirs := getattr(result, times):
            ratios[f"{name}_ratio"] = statistics.median(a / b for a, b in zip(theirs, getattr(first, times)))
    return ratios


def table(rows: Sequence[Row]) -> str:
    """A line a system: numbers, and in brackets how many times those of the first."""
    lines = [f"{'':16}" + "".join(f"{title:>26}" for title, _ in COLUMNS.values())]
    for row in rows:
        cells = [_cell(row, column, ratio) for column, ratio in zip(COLUMNS, RATIOS)]
        lines.append(f"{row['system']:16}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def _cell(row: Row, column: str, ratio: str) -> str:
    return f"{COLUMNS[column][1].format(row[column])} ({row[ratio]:.2f})" if column in row else ""


def keep(out: Path, found: Sequence[Row], rows: Sequence[Row]) -> None:
    """Append what was found to the CSV, and draw all rows that were measured now."""
    with file_errors(out, flag="--out"):
        append(out.with_suffix(".csv"), found)
        _draw_systems(out.with_suffix(".png"), [row for row in rows if not row["curve"]])
        curves = [row for row in rows if row["curve"]]
        if curves:
            _draw_curves(out.with_name(f"{out.name}_curves.png"), curves)


def _draw_systems(path: Path, rows: Sequence[Row]) -> None:
    bars = {"iteration_s": ("One iteration", "seconds", 1), "peak_mib": ("Peak memory", "GiB", 1024)}
    figure, axes = new_figure(rows=1, columns=len(bars))
    for ax, (column, (title, unit, divisor)) in zip(axes, bars.items()):
        draw_bars(ax, {row["system"]: (row[column] / divisor, None) for row in rows})
        ax.set(title=title, ylabel=unit)
    figure.suptitle("student {student}, teacher {teacher}, {device}, {date}".format(**rows[0]), fontsize="small")
    figure.savefig(path)


AXES = {"rows": "global_batch_size", "length": "max_new_tokens", "vocabulary": "vocab_size", "ranks": "threads"}
UNITS = {"rows": "rows of an iteration", "length": "tokens of a response", "vocabulary": "words", "ranks": "CPU threads, one a rank"}


def _draw_curves(path: Path, rows: Sequence[Row]) -> None:
    """Seconds above, memory below, a column a curve."""
    names = list(dict.fromkeys(row["curve"] for row in rows))
    figure, axes = new_figure(rows=2, columns=len(names))
    for i, name in enumerate(names):
        for ax, column, unit in ((axes[i], "iteration_s", "seconds"), (axes[len(names) + i], "peak_mib", "MiB")):
            draw_lines(ax, _series([row for row in rows if row["curve"] == name], AXES[name], column))
            ax.set(xlabel=UNITS[name], ylabel=unit, ylim=(0, None))
    figure.savefig(path)


def _series(rows: Sequence[Row], x: str, y: str) -> dict[str, tuple[list, list]]:
    systems = {row["system"]: [] for row in rows}
    for row in rows:
        systems[row["system"]].append((row[x], row[y]))
    return {name: tuple(map(list, zip(*points))) for name, points in systems.items()}
