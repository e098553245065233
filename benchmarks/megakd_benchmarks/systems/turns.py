"""Systems in processes of their own that take turns, so that load that comes and goes meets all, and memory is each one's own.

A system is made by `make(config, task, models)` and does all its iterations in `run(turn)`, with `turn.begin()` before each and
`turn.end(loss)` after it. `generate(prompts)`, where it has one, answers a batch of prompts and does nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from megakd.config import SystemsConfig
from megakd.errors import UserError, told_in_one_line
from megakd.reporting.stopwatch import now
from megakd.verify import environments
from megakd_benchmarks.measuring import MIB, memory, timed
from megakd_benchmarks.systems.workload import Task


@dataclass
class Turn:
    """A system's end of the line."""

    connection: Connection
    number: int = 0  # of the iteration, from 1

    def begin(self) -> None:
        """Returns when nobody else is at work."""
        self.connection.recv()
        self.number += 1
        self._cpu, self._wall = time.process_time(), now()

    def end(self, loss: float) -> None:
        """Tells what the iteration gave and took."""
        self.connection.send((loss, now() - self._wall, time.process_time() - self._cpu))


def serve(connection: Connection, make: Callable, config: SystemsConfig, task: Task, models: Path, place: dict[str, str]) -> None:
    """One process of a system: iterations, its peak of memory, then responses, each when asked for. `place` is torchrun's environment."""
    os.environ |= place
    torch.set_num_threads(config.threads)
    before = memory("VmRSS")
    with told_in_one_line():
        system = make(config, task, models)
    connection.send("ready")
    system.run(Turn(connection))
    connection.recv()
    connection.send(memory("VmHWM") - before)
    for prompts in task.prompts if hasattr(system, "generate") else ():
        connection.recv()
        _, wall, cpu = timed(lambda prompts=prompts: system.generate(prompts))
        connection.send((0.0, wall, cpu))


class Contestant:
    """A system's processes, seen from outside."""

    def __init__(self, name: str, make: Callable, ranks: int, config: SystemsConfig, task: Task, models: Path):
        self.name, self.generates = name, hasattr(make, "generate")
        context = multiprocessing.get_context("spawn")
        lines = [context.Pipe() for _ in range(ranks)]
        places = environments(ranks) if ranks > 1 else [{}]
        self.processes = [
            context.Process(target=serve, args=(theirs, make, config, task, models, place), daemon=True)
            for place, (_, theirs) in zip(places, lines)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in lines:
            theirs.close()
        self.lines = [ours for ours, _ in lines]
        self._replies()

    def go(self) -> tuple[float, float, float]:
        """Loss, wall seconds of the slowest rank, CPU seconds of all."""
        losses, walls, cpus = zip(*self._ask())
        return losses[0], max(walls), sum(cpus)

    def peak_mib(self) -> float:
        """Of all ranks together, beyond what their imports take."""
        return sum(self._ask()) / MIB

    def _ask(self) -> list:
        for line in self.lines:
            line.send("go")
        return self._replies()

    def _replies(self) -> list:
        try:
            return [line.recv() for line in self.lines]
        except EOFError:
            raise UserError(f"{self.name} ended before its time; what it said stands above") from None

    def close(self) -> None:
        """Its processes end."""
        for process in self.processes:
            process.terminate()
            process.join()
