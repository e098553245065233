"""The CSV of a run and its figure."""

from __future__ import annotations

import csv
import importlib.util
import platform
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from megakd_benchmarks.operators.timing import FIELDS


def machine(device: torch.device, bandwidth: float, threads: int) -> dict[str, str]:
    """What a number means nothing without: the head of the CSV."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {threads} thread(s)"
    triton = metadata.version("triton") if device.type == "cuda" and importlib.util.find_spec("triton") else "not used"
    return {"device": name, "torch": torch.__version__, "triton": triton, "python": platform.python_version(),
            "commit": commit.stdout.strip() or "unknown", "date": date.today().isoformat(),
            "copy bandwidth": f"{bandwidth / 1e9:.1f} GB/s",
            "command": " ".join(["python", "scripts/benchmark_kernels.py", *sys.argv[1:]])}


def write(path: Path, header: dict[str, str], rows: list[dict]) -> None:
    """The CSV, which opens with where its numbers come from, and a figure of it where anything was timed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    if importlib.util.find_spec("matplotlib") is not None and any(row["p50_ms"] for row in rows):
        draw(path.with_suffix(".png"), header, rows)


def draw(path: Path, header: dict[str, str], rows: list[dict]) -> None:
    """Bars of p50, on a CPU of its own time, and the memory beyond the inputs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row["p50_ms"]]
    names = list(dict.fromkeys(row["case"] for row in timed))
    figure, axes = plt.subplots(len(names), 1, figsize=(9, 1.7 * len(names)), squeeze=False)
    clock = "cpu_p50_ms" if header["device"].endswith("thread(s)") else "p50_ms"
    for axis, name in zip(axes[:, 0], names):
        mine = [row for row in timed if row["case"] == name]
        values = [float(row[clock]) for row in mine]
        bars = axis.barh([row["implementation"] for row in mine], values,
                         color=["#c44e52" if row["implementation"].startswith("megakd") else "#8c8c8c" for row in mine])
        labels = [f"{value:.3g} ms, +{float(row['peak_mb']):.0f} MB" for value, row in zip(values, mine)]
        axis.bar_label(bars, labels, padding=3, fontsize=7)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlim(0, 1.35 * max(values))
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    clock_name = "own time" if clock == "cpu_p50_ms" else "median time"
    figure.suptitle(f"loss and gradient, {clock_name}, {header['device']}, torch {header['torch']}, {header['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
