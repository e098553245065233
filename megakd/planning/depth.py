"""A deep model from shallow ones: all that an iteration needs is linear in the layers of student and teacher.

    whole = base + (layers of the student − p)·(slope in them) + (layers of the teacher − p)·(slope in them)

with a layer on each of p stages in the first run, one more on each of the student's in the second, of the teacher's in the third. That it
is linear is no assumption: tests/gpu_simulation/test_planning.py predicts deeper runs, counts exactly and peaks within 1 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megakd.simulation.record import Record, Work

Depths = tuple[int, int]  # layers of student and teacher


def shallow(student: int, teacher: int, stages: int) -> list[Depths]:
    """What to simulate; the models themselves where they are no deeper."""
    p = stages
    if not teacher:
        return [(p, 0), (2 * p, 0)] if student > 2 * p else [(student, 0)]
    return [(p, p), (2 * p, p), (p, 2 * p)] if max(student, teacher) > 2 * p else [(student, teacher)]


@dataclass(frozen=True)
class Line:
    """Numbers of the simulated runs to those of the whole one."""

    weights: tuple[float, ...]  # of each run; they sum to 1

    @classmethod
    def through(cls, runs: list[Depths], whole: Depths) -> Line:
        """To the depths of the whole models."""
        if len(runs) == 1:
            return cls((1.0,))
        steps = [(whole[0] - runs[0][0]) / (runs[1][0] - runs[0][0])]
        if len(runs) == 3:
            steps.append((whole[1] - runs[0][1]) / (runs[2][1] - runs[0][1]))
        return cls((1 - sum(steps), *steps))

    def __call__(self, numbers: list[float]) -> float:
        """Of one quantity, in the order of the runs."""
        return sum(weight * number for weight, number in zip(self.weights, numbers))

    def of_tables(self, tables: list[Mapping[str, float]]) -> dict[str, float]:
        """The same of each name."""
        return {name: self([table.get(name, 0) for table in tables]) for name in dict.fromkeys(name for table in tables for name in table)}

    def of_works(self, tables: list[Mapping[str, Work]]) -> dict[str, Work]:
        """The same of each field of each part."""
        parts = dict.fromkeys(part for table in tables for part in table)
        return {part: Work(**self.of_tables([vars(table.get(part, Work())) for table in tables])) for part in parts}

    def of_nested(self, records: list[Record], read: Callable[[Record], Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
        """The same of what each part holds by name."""
        tables = [read(record) for record in records]
        parts = dict.fromkeys(part for table in tables for part in table)
        return {part: self.of_tables([table.get(part, {}) for table in tables]) for part in parts}
