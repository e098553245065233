"""From a path to records: mappings of fields, each with the place it stands in.

    *.jsonl            one JSON object a line
    *.txt              plain text, as records with the field `text`: a blank line ends a document; or, where `<@x(x!>` stands for
                       newlines (MiniLLM's corpora), a line is a document
    *.parquet *.arrow  one table
    a folder           a dataset saved with `save_to_disk`, or the .parquet or .arrow files in it, in the order of their names

Tables are what Hugging Face's `datasets` writes. They are read by pyarrow, which nothing else needs.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from megakd.errors import UserError

NEWLINE = "<@x(x!>"  # within a document of MiniLLM's corpora
TABLES = (".parquet", ".arrow")
FORMS = "prompt with response (or output), instruction with output, question with answer, messages, or text"


def records(path: Path) -> Iterator[tuple[str, dict]]:
    """Where each record stands, as "train.jsonl line 7", and its fields. Raises UserError where the file cannot be read."""
    if path.is_dir() or (path.suffix in TABLES and path.is_file()):
        return table_records(path)
    if not path.is_file():
        raise UserError(f"{path}: no such data file; give the path of a .jsonl or .txt file")
    if path.suffix in (".bin", ".idx"):
        raise UserError(f"{path} holds token ids, and text is needed here; give the .jsonl they were made from")
    return text_records(path) if path.suffix == ".txt" else json_records(path)


def text_records(path: Path) -> Iterator[tuple[str, dict]]:
    """One record a document; documents are counted from 1."""
    text = read_text(path)
    documents = text.split("\n") if NEWLINE in text else re.split(r"\n\s*\n", text)
    for number, document in enumerate(documents, start=1):
        if document.strip():
            yield f"{path} document {number}", {"text": document.strip("\n").replace(NEWLINE, "\n")}


def json_records(path: Path) -> Iterator[tuple[str, dict]]:
    """One record a line; blank lines are none, but count."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            where = f"{path} line {number}"
            yield where, json_object(line, where)


def read_text(path: Path) -> str:
    """With or without a byte-order mark. Raises UserError where the file is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error


def json_object(line: str, where: str) -> dict:
    """The fields of one line. Raises UserError where it is no JSON object."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg} at column {error.colno}): {short(line)}; fix it") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} is {short(line)}, not a JSON object; it needs {FORMS}")
    return fields


def table_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of all tables of a path; a column that is null in a row is no field of it."""
    number = 0
    for file in table_files(path):
        for fields in read_table(file):
            yield f"{path} row {number}", {name: value for name, value in fields.items() if value is not None}
            number += 1


def table_files(path: Path) -> list[Path]:
    """In the order of the rows: as `save_to_disk` noted it, or that of their names."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise UserError(f"{path} holds the splits {', '.join(splits)}; give the folder of one, as {path / splits[0]}")
    if (path / "state.json").is_file():
        return [path / file["filename"] for file in json.loads((path / "state.json").read_text())["_data_files"]]
    files = sorted(file for file in path.iterdir() if file.suffix in TABLES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} is a folder without .parquet or .arrow files; give such a folder, or a .jsonl or .txt file")
    return files


def read_table(file: Path) -> Iterator[dict]:
    """Batch by batch."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise UserError(f"{file}: tables need `pip install pyarrow`; or convert them to .jsonl") from error
    try:
        batches = parquet.ParquetFile(file).iter_batches() if file.suffix == ".parquet" else ipc.open_stream(file)
        for batch in batches:
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is no {file.suffix} file ({str(error).splitlines()[0]}); save it again") from error


def short(text: str) -> str:
    """60 characters at most, for messages."""
    return text if len(text) <= 60 else text[:57] + "..."
