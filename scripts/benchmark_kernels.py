#!/usr/bin/env python3
"""Each kernel beside what one would write or install instead, from inputs to gradients, in one run on one machine.

    python scripts/benchmark_kernels.py                       # a GPU: every case of an H200, at most ten minutes
    python scripts/benchmark_kernels.py --device cpu --threads 1

A row of the CSV is one implementation of one case: milliseconds (p20, p50, p80; on a GPU by events, with the second-level cache
flushed before each repetition; on a CPU also the process's own time, which other load does not change), the share of the copy
bandwidth measured in this run that the needed bytes make of p50, the memory beyond the inputs, and the error of the gradient
against float64. What is wrong is not timed, and says so. Needed bytes: logits read twice (a mixture's three times) and a gradient
written once.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from megakd_benchmarks.operators.cases import cases
from megakd_benchmarks.operators.report import machine, write
from megakd_benchmarks.operators.timing import FIELDS, copy_bandwidth, measure

from megakd.errors import quiet_pipe

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, for the repetitions of one implementation")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which no further case is started")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="where to write, no suffix [benchmarks/results/kernels_<device>]")
    with quiet_pipe():
        args = parser.parse_args()
    out = args.out or RESULTS / f"kernels_{args.device}"
    table, figure = out.with_suffix(".csv"), out.with_suffix(".png")
    if (table.exists() or figure.exists()) and not (table.is_file() and table.read_text(errors="replace").startswith("# device: ")):
        parser.error(f"--out {out}: {table.name} or {figure.name} is there, and no benchmark wrote it; give another name")
    torch.set_num_threads(args.threads)
    device, start = torch.device(args.device), time.monotonic()
    bandwidth = copy_bandwidth(device)
    header = machine(device, bandwidth, args.threads)  # now: the working tree may change while this runs
    rows: list[dict] = []
    for case in cases(args.device):
        if args.only not in case.name:
            continue
        if time.monotonic() - start > args.limit:
            rows.append(dict.fromkeys(FIELDS, "") | {"case": case.name, "note": f"not started: {args.limit:.0f} s were over"})
            continue
        for row in measure(case, device, bandwidth, args.seconds):
            rows.append(row)
            print(" | ".join(str(row[field]) for field in FIELDS), flush=True)
        torch.compiler.reset()
    write(out, header, rows)


if __name__ == "__main__":
    main()
