"""Which teacher a row learns from: the one that a field of it names."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from megakd.data.batch import Sample
from megakd.data.indexed import IndexedDataset
from megakd.data.text_dataset import TextDataset
from megakd.data.values import shown
from megakd.errors import UserError


class RoutedData(Sequence[Sample]):
    """The samples of `rows`, each with its teacher. What else they know of themselves is asked as before.

    Raises UserError at the first row without the field, or with a name that is none of `teachers`; or for token ids, which have no fields.
    """

    def __init__(self, rows: TextDataset | IndexedDataset, field: str, teachers: Collection[str]) -> None:
        if isinstance(rows, IndexedDataset):
            raise UserError(f"{rows.where(0)} is token ids, and --teacher-field needs rows with fields; give the .jsonl of them")
        self.rows = rows
        self.teachers = [self._teacher(i, field, teachers) for i in range(len(rows))]

    def _teacher(self, index: int, field: str, teachers: Collection[str]) -> str:
        name = self.rows.fields(index).get(field)
        if not isinstance(name, str) or name not in teachers:
            has = f"field {field} is {shown(name)}" if name is not None else f"has no field {field}"
            raise UserError(f"{self.rows.where(index)}: {has}; --teacher-field names one of the teachers {', '.join(teachers)}")
        return name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return replace(self.rows[index], teacher=self.teachers[index])

    def where(self, index: int) -> str:
        """File and line of the row, as in messages."""
        return self.rows.where(index)
