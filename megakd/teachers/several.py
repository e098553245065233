"""Several teachers, of which each row has one: every micro-batch is one teacher's, and that one alone reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megakd.data.batch import Batch
from megakd.losses.token_loss import Rows
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.teachers.teacher import Teacher


class SeveralTeachers(Teacher):
    """Teachers by name. None of them is the model that a method could work with."""

    def __init__(self, teachers: Mapping[str, Teacher]):
        self.teachers = teachers

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout) -> list[Rows]:
        found: dict[int, Rows] = {}
        for name, teacher in self.teachers.items():
            places = [i for i, batch in enumerate(batches) if batch.teacher == name]
            if places:
                found |= zip(places, teacher.read([batches[i] for i in places], to=to))
        return [found[i] for i in sorted(found)]  # none but on the last stage
