"""What was measured, told three times: a table for people, a line a system in a CSV that grows, and a figure."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from megakd.config import BenchmarkConfig
from megakd.errors import UserError, file_errors
from megakd.reporting.flops import peak_flops
from megakd.reporting.own_folder import check_can_write
from megakd.reporting.plots import COLOURS, draw_bars, label_of, new_figure
from megakd_benchmarks.measuring import PARTS, Timed, median_ratio

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "megatron-core", "peft")
Row = dict[str, "str | float"]


def machine(script: str = "benchmark.py", packages: Sequence[str] = PACKAGES) -> Row:
    """Device, versions, commit and command; the load says whether others were at work."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "date": date.today().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "versions": " ".join(f"{name} {_version(name)}" for name in packages),
        "commit": commit(),
        "command": " ".join(["python", f"scripts/{script}", *sys.argv[1:]]),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def commit() -> str:
    """Short, with + where tracked files have changed since."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "megakd", "kernels", "scripts")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "") or "unknown"


def what_ran(config: BenchmarkConfig, source: str) -> Row:
    """Sizes and layout; `source` says where the rows come from."""
    parallel = config.parallel
    sizes = {name: "×".join(map(str, size)) for name, size in config.sizes.items()}
    layout = f"TP{parallel.tensor_model_parallel_size} PP{parallel.pipeline_model_parallel_size} of {os.environ.get('WORLD_SIZE', '1')}"
    return {
        **sizes,
        "data": source,
        "global_batch": config.global_batch_size,
        "micro_batch": config.micro_batch_size,
        "layout": layout,
    }


def iteration_columns(times: Sequence[Timed], flops: Sequence[float]) -> Row:
    """Medians over the repetitions; `flops` are those that each of them needs."""
    if not times:
        return {}
    median = statistics.median
    speed = median(needed / t.wall for needed, t in zip(flops, times))
    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        "repetitions": len(times),
        "iteration_s": median(t.wall for t in times),
        "iteration_cpu_s": median(t.cpu for t in times),
        **{f"{part}_s": median(t.parts[part] for t in times) for part in PARTS},
        "tokens_per_s": median(t.tokens_per_second for t in times),
        "flop_per_s": speed,
        "mfu": speed / peak / ranks if peak else "",
        "real_share": sum(t.tokens for t in times) / sum(t.tokens / t.real_share for t in times),
    }


def generation_columns(times: Sequence[Timed]) -> Row:
    """Medians over the repetitions; nothing where generation was not measured."""
    if not times:
        return {}
    return {
        "generation_s": statistics.median(t.wall for t in times),
        "generation_cpu_s": statistics.median(t.cpu for t in times),
        "generation_tokens_per_s": statistics.median(t.tokens_per_second for t in times),
    }


def ratio_columns(names: Sequence[str], iterations: Mapping, generations: Mapping, peaks: Mapping[str, float]) -> Row:
    """How many times the second system needs of what the first does; medians of pairs."""
    ours, theirs = names
    ratios = {}
    for what, times in (("iteration", iterations), ("generation", generations)):
        for suffix, clock in (("", "wall"), ("_cpu", "cpu")) if times else ():
            ratios[f"{what}{suffix}_ratio"] = median_ratio(times[theirs], times[ours], clock)
    if peaks:
        ratios["peak_ratio"] = peaks[theirs] / peaks[ours]
    return ratios


# ---- table


SHOWN = {  # column: title, how a number is printed
    "iteration_s": ("iteration", "{:.2f} s"),
    "iteration_cpu_s": ("iteration, CPU time", "{:.2f} s"),
    **{f"{part}_s": (f"  {label_of(part)}", "{:.2f} s") for part in PARTS},
    "tokens_per_s": ("real tokens per second", "{:,.0f}"),
    "flop_per_s": ("needed FLOP per second", "{:.3g}"),
    "mfu": ("MFU", "{:.1%}"),
    "real_share": ("computed positions that are real", "{:.1%}"),
    "peak_mib": ("peak memory", "{:,.0f} MiB"),
    "generation_s": ("generation alone", "{:.2f} s"),
    "generation_cpu_s": ("generation alone, CPU time", "{:.2f} s"),
    "generation_tokens_per_s": ("  tokens per second", "{:,.0f}"),
}
RATIOS = {
    "iteration_ratio": "iteration",
    "iteration_cpu_ratio": "iteration, CPU time",
    "peak_ratio": "peak memory",
    "generation_ratio": "generation alone",
    "generation_cpu_ratio": "generation alone, CPU time",
}


def table(rows: Sequence[Row]) -> str:
    """A line a quantity, a column a system; below it how many times the first system's the last one's are."""
    lines = [f"{'':34}" + "".join(f"{row['system']:>22}" for row in rows)]
    for column, (title, form) in SHOWN.items():
        values = [row.get(column, "") for row in rows]
        if any(value != "" for value in values):
            lines.append(f"{title:34}" + "".join(f"{'' if value == '' else form.format(value):>22}" for value in values))
    ours, theirs = rows[0]["system"], rows[-1]["system"]
    lines += [f"{theirs} / {ours}, {title}: {rows[-1][name]:.2f}" for name, title in RATIOS.items() if name in rows[-1]]
    return "\n".join(lines)


# ---- files


def place(config: BenchmarkConfig) -> Path:
    """--out, or where results of this device are kept; without a suffix."""
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    return Path(config.out) if config.out else ROOT / "benchmarks" / "results" / f"iteration_{kind}"


def check_place(out: Path) -> None:
    """A table of benchmarks grows; a file of another kind is not touched.

    Raises:
        UserError: a table or figure there is no benchmark's, or nothing can be written there.
    """
    table, figure = out.with_suffix(".csv"), out.with_suffix(".png")
    check_can_write(out.parent, flag="--out")
    with file_errors(table, flag="--out"):
        columns = table.read_text(encoding="utf-8").split("\n")[0].split(",") if table.exists() else []
    if (table.exists() or figure.exists()) and not {"device", "commit", "command", "system"} <= set(columns):
        raise UserError(f"--out {out}: {table.name} or {figure.name} is there, and no benchmark wrote it; give another name")


def append(path: Path, rows: Sequence[Row]) -> None:
    """Rows at the end of a CSV; one with other columns is read and written anew with the columns of both."""
    old = list(csv.DictReader(path.open(newline="", encoding="utf-8"))) if path.exists() else []
    columns = dict.fromkeys([*(old[0] if old else ()), *(name for row in rows for name in row)])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows([*old, *({name: _short(value) for name, value in row.items()} for row in rows)])


def _short(value: str | float) -> str | float:
    return f"{value:.5g}" if isinstance(value, float) else value


def draw(path: Path, rows: Sequence[Row]) -> None:
    """Where an iteration's time goes, as stacked bars; beside it peak memory and generation alone."""
    extra = {name: shown for name, shown in BARS.items() if all(row.get(name, "") != "" for row in rows)}
    figure, (first, *axes) = new_figure(rows=1, columns=1 + len(extra))
    _draw_parts(first, rows)
    for ax, (name, (title, unit, divisor)) in zip(axes, extra.items()):
        draw_bars(ax, {row["system"]: (row[name] / divisor, None) for row in rows})
        ax.set(title=title, ylabel=unit)
    figure.suptitle("student {student}, teacher {teacher}, {device}, {date}".format(**rows[0]), fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


BARS = {
    "peak_mib": ("Peak memory", "GiB", 1024),
    "generation_s": ("Generation alone", "seconds", 1),
}  # column: title, unit, divisor


def _draw_parts(ax, rows: Sequence[Row]) -> None:
    names = [row["system"] for row in rows]
    bottom = [0.0] * len(rows)
    for part, colour in zip(PARTS, COLOURS):
        heights = [row[f"{part}_s"] for row in rows]
        ax.bar(names, heights, bottom=bottom, color=colour, width=0.6, label=label_of(part), edgecolor="white", linewidth=0.5)
        bottom = [low + height for low, height in zip(bottom, heights)]
    for x, (row, total) in enumerate(zip(rows, bottom)):  # medians of parts do not add up to the median of their sum
        ax.annotate(f"{row['iteration_s']:.3g} s", (x, total), ha="center", va="bottom", fontsize="small")
    ax.set(title="One PromptKD iteration", ylabel="seconds")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], frameon=False, fontsize="small")
