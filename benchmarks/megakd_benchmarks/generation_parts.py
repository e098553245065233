"""Where the time of generation goes: seconds of each part, and of decode steps by how many rows they have. On a CPU they are processor time
of this process, which other work on the machine hardly moves; on a GPU wall time.

The parts' functions are timed from outside, each without what it calls that is a part of its own, so that parts add up to the whole.
A step is a decoder's `decode`: of the first component, on this rank's stage.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from megakd.data.batch import Sample
from megakd.generation.decoder import Decoder
from megakd.generation.rows import RowGroup
from megakd.generation.sampling import Sampler
from megakd.reporting import stopwatch
from megakd_benchmarks.workload import Workload

PARTS = {  # by what they are called here: the functions, and what else they are
    "prefill": (Decoder, "prefill"),
    "decode, layers": (Decoder, "decode"),
    "decode, masks": (Decoder, "masks"),
    "head": (Decoder, "head"),
    "sampling": (Sampler, "__call__"),
    "rows leave and join": (RowGroup, "drop_finished"),
    "tokens recorded": (RowGroup, "record"),
}
REST = "other"
BINS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of a step, up to


def now() -> float:
    """Seconds of the clock in use."""
    return stopwatch.now() if torch.cuda.is_available() else time.process_time()


class Account:
    """Seconds by part, and of steps by their rows."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.steps: Counter[int] = Counter()  # by the most rows of their bin
        self.step_seconds: Counter[int] = Counter()
        self.step_rows: Counter[int] = Counter()
        self.prompt_columns = 0  # computed in prefill, padding included
        self._inner: list[float] = [0.0]  # seconds spent in parts that the part under way has called

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What lies inside is `name`'s, but for parts within it."""
        self._inner.append(0.0)
        start = now()
        yield
        seconds = now() - start
        self.seconds[name] += seconds - self._inner.pop()
        self._inner[-1] += seconds

    def step(self, rows: int, seconds: float) -> None:
        """One decode step, its head included, sampling not."""
        most = next((most for most in BINS if rows <= most), rows)
        self.steps[most] += 1
        self.step_rows[most] += rows
        self.step_seconds[most] += seconds

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Of whatever is generated inside."""
        with ExitStack() as stack:
            for name, (owner, function) in PARTS.items():
                stack.enter_context(patch.object(owner, function, self._timed(name, getattr(owner, function))))
            with self.part(REST):
                yield

    def _timed(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(owner, *args, **options):
            start = now()
            with self.part(name):
                result = function(owner, *args, **options)
            if name == "decode, layers":
                self.step(len(args[0]), now() - start)
            if name == "prefill":
                self.prompt_columns += sum((owner.soft_length + part.width) * len(part.rows) for part in owner.slices)
            return result

        return timed

    def table(self, prompt_positions: int, tokens: int) -> str:
        """For people: parts, then steps by rows, then how much of it was real."""
        total, steps = sum(self.seconds.values()), sum(self.steps.values())
        lines = [f"| part | seconds | share |\n|---|---|---|\n| all | {total:.2f} | |"]
        lines += [f"| {name} | {self.seconds[name]:.2f} | {self.seconds[name] / total:.1%} |" for name in (*PARTS, REST)]
        lines += ["", "| rows of a step | steps | rows computed | seconds | ms a step | ms a row |\n|---|---|---|---|---|---|"]
        for most in sorted(self.steps):
            count, rows, seconds = self.steps[most], self.step_rows[most], self.step_seconds[most]
            bounds = f"{most // 2 + 1} to {most}" if most > 2 else f"{most}"
            lines.append(f"| {bounds} | {count} | {rows} | {seconds:.2f} | {1e3 * seconds / count:.1f} | {1e3 * seconds / rows:.2f} |")
        computed = sum(self.step_rows.values())
        lines.append(f"\n{steps} steps of {computed / max(1, steps):.1f} rows; {tokens} tokens; prompt positions computed that are real: "
                     f"{prompt_positions / max(1, self.prompt_columns):.1%}")  # fmt: skip
        return "\n".join(lines)


def report_parts(system, workload: Workload) -> str:
    """The table of one system that generates as megakd does, over the measured batches; a few rows of the first batch warm it up."""
    system.generate(workload.first[: 4 * system.layout.dp_size])
    account = Account()
    for batch in workload.batches[1:]:
        with account.taken():
            system.generate(batch)
    return account.table(*totals([row for batch in workload.batches[1:] for row in batch]))


def totals(rows: Sequence[Sample]) -> tuple[int, int]:
    """Tokens of the prompts, and of the responses."""
    return sum(len(row.prompt) for row in rows), sum(len(row.response) for row in rows)
