"""Several simulated ranks at once: torch is imported once, behind the shim, and a fork of that process is each of them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megakd.simulation import shim
from megakd.simulation.record import Record
from megakd.simulation.settings import Simulated

ASKED, FOUND = "{:03}.asked.json", "{:03}.found.json"


def simulate(ranks: Sequence[Simulated]) -> list[Record]:
    """What was seen of each, in a process of its own.

    Raises:
        UserError: the shim cannot be compiled.
    """
    shim.compiled()  # here, where an error is told
    with tempfile.TemporaryDirectory() as folder:
        for number, rank in enumerate(ranks):
            rank.write(Path(folder) / ASKED.format(number))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-m", "megakd.simulation", folder], capture_output=True, text=True, env=environment)
        found = [Path(folder) / FOUND.format(number) for number in range(len(ranks))]
        if done.returncode or not all(path.is_file() for path in found):
            raise RuntimeError(f"the simulation ended with {done.returncode}: {done.stderr[-4000:]}")
        return [Record.read(path) for path in found]


def simulate_folder(folder: Path, processes: int) -> None:
    """The ranks that `simulate` asks for, in a process that has imported what they need. Last stages come first: they tell the others
    what their losses log."""
    from megakd.simulation.rank import record_of  # imports torch, which comes after the shim

    shim.hold_device()

    told: dict[str, list] = {}

    def simulated(number: int, rank: Simulated) -> None:
        record_of(rank).write(folder / FOUND.format(number))

    asked = {number: Simulated.read(path) for number, path in enumerate(sorted(folder.glob(ASKED.replace("{:03}", "*"))))}
    for last_stage in (True, False):
        part = {n: replace(rank, told=told.get(rank.job, [])) for n, rank in asked.items() if rank.is_last_stage == last_stage}
        in_forks(simulated, list(part.items()), processes)
        told |= {rank.job: Record.read(folder / FOUND.format(n)).told for n, rank in part.items()}


def in_forks(work: Callable, arguments: list[tuple], processes: int) -> None:
    """`work` with each of the arguments in a process of its own, so many at a time."""
    fork, waiting, running = multiprocessing.get_context("fork"), arguments[::-1], []
    while waiting or running:
        while waiting and len(running) < processes:
            running.append(fork.Process(target=work, args=waiting.pop()))
            running[-1].start()
        multiprocessing.connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.is_alive()]
