"""Rows of a .csv or .tsv file. The first names the fields; an empty cell is no field of its row."""

import csv
from collections.abc import Iterator
from pathlib import Path

from megakd.data.text_files import read_lines
from megakd.data.values import MOST_TEXT, short
from megakd.errors import UserError


def csv_records(path: Path, *, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    """The line in which each row begins, as "line 7", and its fields.

    Raises:
        UserError: the file cannot be read, or a row does not fit its names; with the line.
    """
    rows = cells(path, delimiter)
    _, names = next(rows, ("", []))
    if len(set(names)) < len(names):
        raise UserError(f"{path} line 1 names a field twice: {short(', '.join(names))}; the first line of a table names its fields")
    for number, row in rows:
        if len(row) != len(names):
            counts = f"has {len(row)} cells, the first line {len(names)} names"
            raise UserError(f"{path} line {number} {counts}; quote a cell that holds {delimiter!r}")
        yield f"line {number}", {name: cell for name, cell in zip(names, row) if cell}


def cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line in which each row begins, and its cells; blank lines are none, but count."""
    csv.field_size_limit(MOST_TEXT)  # Python's own limit is 131,072 characters
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)
    begins = 1
    try:
        for row in reader:
            if row:
                yield begins, row
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} line {begins} is no row of a table ({error}); fix its quotes") from error
