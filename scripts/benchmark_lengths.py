"""Peak memory of an iteration of SFT, KD and PromptKD against the length of a row, each in a process of its own.

    python scripts/benchmark_lengths.py                       # 512 to 8,192 positions, on a CPU; minutes
    python scripts/benchmark_lengths.py --lengths 512 1024

Every iteration is one micro-batch of one row; of as many positions as the longest has, there is one of eight packed rows of unlike
length as well. A figure and its numbers are written: benchmarks/results/lengths_cpu.png and .csv.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from megakd_benchmarks.lengths import Case, peak_in_own_process
from megakd_benchmarks.report import machine

from megakd.errors import quiet_pipe
from megakd.reporting.plots import new_figure, save

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
METHODS = ("sft", "kd", "promptkd")
COLUMNS = ("case", "positions", "rows", "kept_mib", "peak_mib")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="positions of a row")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="which methods")
    parser.add_argument("--recompute", action="store_true", help="with recomputed activations")
    parser.add_argument("--out", type=Path, default=RESULTS / "lengths_cpu", help="where figure and CSV go, no suffix")
    with quiet_pipe():
        args = parser.parse_args()
    rows = [measured(case) for case in cases(args.methods, sorted(args.lengths), args.recompute)]
    here = machine() | {"command": " ".join(["python", "scripts/benchmark_lengths.py", *sys.argv[1:]])}
    table = [[*row, *(here[name] for name in ("date", "device", "versions", "commit", "command"))] for row in rows]
    save(figure_of(rows), args.out.with_suffix(".png"), [*COLUMNS, "date", "device", "versions", "commit", "command"], table)
    print(args.out.with_suffix(".csv"))


def cases(methods: list[str], lengths: list[int], recompute: bool) -> list[Case]:
    """One row of each length; and as many positions as the longest has in packed rows, of which one has half of them."""
    single = [Case(method, (length,), recompute=recompute) for method in methods for length in lengths]
    most = lengths[-1]
    unlike = (most // 2, *[most // 14] * 7)
    return [*single, Case("sft", unlike, pack=True, recompute=recompute)]


def measured(case: Case) -> list:
    """A line of the table."""
    kept, peak = peak_in_own_process(case)
    print(f"{case.name}, {sum(case.lengths):,} positions: {kept:,.0f} MiB kept, {peak:,.0f} at the most", flush=True)
    return [case.name, sum(case.lengths), len(case.lengths), round(kept), round(peak)]


def figure_of(rows: list[list]):
    """Peak against length, a line a method."""
    figure, (ax,) = new_figure(rows=1, columns=1)
    for name in dict.fromkeys(name for name, _, count, *_ in rows if count == 1):
        points = [(positions, peak) for which, positions, _, _, peak in rows if which == name]
        ax.plot(*zip(*points), marker="o", markersize=3, label=name)
    ax.set(title="Peak memory of an iteration", xlabel="positions of a row", ylabel="MiB", ylim=(0, None))
    ax.legend(frameon=False, fontsize="small")
    return figure


if __name__ == "__main__":
    main()
