"""Several teachers, of which each row has one: every micro-batch is one teacher's, and that one alone reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from megakd.data.batch import Batch
from megakd.runtime.parallel_layout import Grid, ParallelLayout
from megakd.schedules import Context, Windows
from megakd.teachers.teacher import Teacher


class SeveralTeachers(Teacher):
    """Teachers by name, all in one layout. None of them is the model that a method could work with."""

    def __init__(self, teachers: Mapping[str, Teacher]):
        self.teachers = dict(sorted(teachers.items()))  # as micro_batches has their rows

    @property
    def layout(self) -> ParallelLayout | Grid | None:
        return next(iter(self.teachers.values())).layout

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout) -> Context:
        """Each is asked on every rank, be it about nothing: where rows travel, all ranks have a part in it."""
        shares = [[batch for batch in batches if batch.teacher == name] for name in self.teachers]
        found = [teacher.read(share, to=to) for teacher, share in zip(self.teachers.values(), shares)]
        if any(isinstance(rows, Windows) for rows in found):
            return Windows(chain.from_iterable(rows.parts for rows in found))
        return list(chain.from_iterable(found))
