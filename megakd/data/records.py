"""From a path to records: mappings of fields, each with the place it stands in.

    *.jsonl *.json     one JSON object a line, or one list of them; so is a file of any other name
    *.csv *.tsv        a table whose first line names the fields
    *.txt              plain text, as records with the field `text`: a blank line ends a document; or, where `<@x(x!>` stands for
                       newlines (MiniLLM's corpora), a line is a document
    any of these .gz   packed
    *.parquet *.arrow  one table
    a folder           a dataset saved with `save_to_disk`, or the .parquet or .arrow files in it, in the order of their names
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from megakd.data.csv_files import csv_records
from megakd.data.json_files import json_records
from megakd.data.tables import TABLES, table_records
from megakd.data.text_files import read_lines
from megakd.data.values import MOST_TEXT, check_record
from megakd.errors import UserError

NEWLINE = "<@x(x!>"  # within a document of MiniLLM's corpora


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """The place of each record, as "line 7", and its fields.

    Raises:
        UserError: the file cannot be read, or holds what no record does; with the place.
    """
    for place, fields in reader_of(path)(path):
        yield place, check_record(fields, f"{path} {place}")


def reader_of(path: Path) -> Callable[[Path], Iterator[tuple[str, object]]]:
    """The function that reads a file of this name."""
    if path.is_dir() or (path.suffix in TABLES and path.is_file()):
        return table_records
    if not path.is_file():
        raise UserError(f"{path}: no such data file; give the path of a .jsonl or .txt file")
    name = path.with_suffix("") if path.suffix == ".gz" else path
    if name.suffix in (".bin", ".idx"):
        raise UserError(f"{path} holds token ids, and text is needed here; give the .jsonl they were made from")
    readers = {".txt": text_records, ".csv": csv_records, ".tsv": partial(csv_records, delimiter="\t")}
    return readers.get(name.suffix, json_records)


def text_records(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """One record a document; documents are counted from 1."""
    documents = lines_as_documents(path) if holds(path, NEWLINE) else paragraphs(path)
    for number, document in enumerate(documents, start=1):
        if document.strip():
            yield f"document {number}", {"text": document}


def holds(path: Path, text: str) -> bool:
    """Whether the text stands in one of the lines."""
    return any(text in line for _, line in read_lines(path))


def lines_as_documents(path: Path) -> Iterator[str]:
    """Each line, with the newlines that it stands for."""
    return (line.strip("\n").replace(NEWLINE, "\n") for _, line in read_lines(path))


def paragraphs(path: Path) -> Iterator[str]:
    """What stands between blank lines."""
    lines: list[str] = []
    size = 0
    for number, line in read_lines(path):
        size = size + len(line) if line.strip() else 0
        if size > MOST_TEXT:
            raise UserError(f"{path} line {number}: a document of more than {MOST_TEXT:,} characters; divide it by blank lines")
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).strip("\n")
            lines = []
    yield "".join(lines).strip("\n")
