"""Rows of .parquet and .arrow files, as Hugging Face's `datasets` writes them, read by pyarrow, which nothing else needs."""

import json
from collections.abc import Iterator
from pathlib import Path

from megakd.errors import UserError, check_file, file_errors, read_json
from megakd.model_files import file_in

TABLES = (".parquet", ".arrow")
ROWS_AT_ONCE = 256  # as Python's values a row takes many times its room in the file


def table_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Rows of all tables of a path, counted from 0 as `datasets` counts; a column that is null in a row is no field of it."""
    number = 0
    for file in table_files(path):
        for fields in read_table(file):
            yield f"row {number}", {name: sayable(value) for name, value in fields.items() if value is not None}
            number += 1


def sayable(value: object) -> object:
    """The value; dates, decimals and bytes, for which JSON has no word, as the text that Python shows."""
    return json.loads(json.dumps(value, default=str)) if not isinstance(value, str) else value


def table_files(path: Path) -> list[Path]:
    """In the order of the rows: as `save_to_disk` noted it, or that of their names."""
    if (path / "dataset_dict.json").is_file():
        splits = noted(path / "dataset_dict.json", "splits")
        raise UserError(f"{path} holds the splits {', '.join(splits)}; give the folder of one, as {path / splits[0]}")
    if (path / "state.json").is_file():
        return [noted_file(path, entry) for entry in noted(path / "state.json", "_data_files")]
    with file_errors(path):
        files = sorted(file for file in path.iterdir() if file.suffix in TABLES) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} is a folder without .parquet or .arrow files; give such a folder, or a .jsonl or .txt file")
    return files


def noted(file: Path, key: str) -> list:
    """The list of that name that `save_to_disk` wrote."""
    notes = read_json(file)
    found = notes.get(key) if isinstance(notes, dict) else None
    if not (isinstance(found, list) and found):
        raise UserError(f"{file} names no {key}, as `save_to_disk` does; save the dataset again")
    return found


def noted_file(folder: Path, entry: object) -> Path:
    """The file of an entry of state.json, which lies beside it."""
    name = entry.get("filename") if isinstance(entry, dict) else None
    return file_in(folder, name, named_by=folder / "state.json")


def read_table(file: Path) -> Iterator[dict]:
    """Some rows at a time."""
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError as error:
        raise UserError(f"{file}: tables need `pip install pyarrow`; or convert them to .jsonl") from error
    check_file(file)
    try:
        with file_errors(file):
            if file.suffix == ".parquet":
                batches = parquet.ParquetFile(file).iter_batches(batch_size=ROWS_AT_ONCE)
            else:
                batches = ipc.open_stream(pyarrow.memory_map(str(file)))
            for batch in batches:
                for first in range(0, len(batch), ROWS_AT_ONCE):
                    yield from batch.slice(first, ROWS_AT_ONCE).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is no {file.suffix} file ({str(error).splitlines()[0]}); save it again") from error
