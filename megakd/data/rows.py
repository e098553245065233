"""The rows of a file: read once, kept as they stand in it, and made anew when one is asked for.

Which fields of a record are read, and before which others, is decided in `forms.py`: messages, prompt, instruction, question, text;
and response, completion, output, answer.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.data.conditioning import PLAIN_TEXT, Conditioning
from megakd.data.forms import Row, RowReader
from megakd.data.packed import Packed
from megakd.data.records import records
from megakd.data.templates import open_template
from megakd.data.values import FORMS
from megakd.errors import UserError

PART = 2**16  # characters of the rows that are worked on at once


def read_rows(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, template: str = "alpaca") -> "Rows":
    """All rows of a file or dataset folder; `messages` need the tokenizer.

    Raises UserError naming file, line, value and way out where one cannot be used.
    """
    rows = Rows(path, tokenizer, template=template)
    for _ in rows.read():
        pass
    return rows


class Rows(Sequence[Row]):
    """The rows of a file as far as it has been read, each made anew when it is asked for.

    Kept are the records, as JSON: about as much as the file, where rows of text take several times that.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        template: str = "alpaca",
        conditioning: Conditioning | None = None,
    ) -> None:
        self.path, self.conditioning = Path(path), conditioning
        self._reader = RowReader(open_template(template), tokenizer)
        self._records = Packed()

    def read(self) -> Iterator[Row]:
        """Every row, once; then what is to be told of them all."""
        for place, fields in records(self.path):
            self._records.append(json.dumps([place, fields], ensure_ascii=False).encode())
            row = self._row(place, fields)
            if row.is_text and self.conditioning and self.conditioning.settings.adds_text:
                self._reader.notes.add(PLAIN_TEXT, row.where)
            yield row
        if not self:
            raise UserError(f"{self.path} is empty; it needs one JSON object a line with {FORMS}")
        self._reader.notes.tell()

    def read_in_parts(self) -> Iterator[list[Row]]:
        """The same, some rows at a time: as many as are worth a call of the tokenizer, whose notes on them are large."""
        part, size = [], 0
        for row in self.read():
            part.append(row)
            size += len(row.prompt) + len(row.response or "")
            if size >= PART:
                yield part
                part, size = [], 0
        if part:
            yield part

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Row:
        return self._row(*self._record(index))

    def _row(self, place: str, fields: dict) -> Row:
        row = self._reader.row_of(fields, f"{self.path} {place}")
        return self.conditioning.row(row, fields) if self.conditioning else row

    def where(self, index: int) -> str:
        """File and place of a row, as in messages."""
        return f"{self.path} {self._record(index)[0]}"

    def fields(self, index: int) -> dict:
        """All that the record of a row holds."""
        return self._record(index)[1]

    def _record(self, index: int) -> tuple[str, dict]:
        return json.loads(self._records[index])
