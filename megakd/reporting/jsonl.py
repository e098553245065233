"""A file of one JSON object a line, each with its iteration, that can be taken up again after an interruption."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.errors import UserError, file_errors, tell
from megakd.reporting.own_folder import hidden

RENAMED = {"valid/lm": "valid/lm_loss"}  # as earlier versions wrote it: today's name


class JsonLines:
    """Appends objects to `path`. Lines after `resumed_iteration` are removed first; all of them where it is None (a new run).

    Raises:
        UserError: the file cannot be read or written, here as in what follows.
    """

    def __init__(self, path: Path, *, resumed_iteration: int | None = None) -> None:
        self.path = path
        kept = [] if resumed_iteration is None else [row for row in self._whole_rows() if row["iteration"] <= resumed_iteration]
        beside = hidden(path)
        with file_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text("".join(map(dump, kept)), encoding="utf-8")
            os.replace(beside, path)  # an interruption here leaves the old file or the new one, never half of one
            self._file = path.open("a", buffering=1, encoding="utf-8")  # line-buffered: a killed run keeps every finished line

    def _whole_rows(self) -> list[dict[str, Any]]:
        rows, damaged = read_rows(self.path)
        if damaged:
            last = rows[-1]["iteration"] if rows else "none"
            tell(f"{self.path}: damaged at its end, as by a crash; {damaged} line(s) after iteration {last} are cut off")
        return rows

    def append(self, iteration: int, values: Mapping[str, Any]) -> None:
        """One line; `iteration` comes first in it."""
        with file_errors(self.path):
            self._file.write(dump({"iteration": iteration, **values}))

    def close(self) -> None:
        """Nothing is kept back until then: lines are written one by one."""
        with file_errors(self.path):
            self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file JsonLines wrote; none where there is no file. What a crash left damaged at its end is left out.

    Raises:
        UserError: the file cannot be read, or a line is damaged and whole ones follow.
    """
    return read_rows(path)[0]


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The same, and the number of damaged lines at the end; one cut short while it was written does not count."""
    if not path.exists():
        return [], 0
    with file_errors(path):
        *lines, _unfinished = path.read_bytes().split(b"\n")  # a finished line ends with a newline
    rows = list(map(row_of, lines))
    whole = next((i for i in range(len(rows), 0, -1) if rows[i - 1]), 0)
    if damaged := next((i for i, row in enumerate(rows[:whole], start=1) if not row), None):
        raise UserError(f"{path} line {damaged} is damaged, and whole lines follow it; remove that line")
    return rows[:whole], len(rows) - whole


def row_of(line: bytes) -> dict[str, Any] | None:
    """An object with its iteration, under today's names; None where a crash left something else, such as NULs."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("iteration"), int):
        return None
    return {RENAMED.get(name, name): value for name, value in row.items()}


def dump(values: Mapping[str, Any]) -> str:
    """One line. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(finite(values), allow_nan=False, ensure_ascii=False) + "\n"


def finite(value: Any) -> Any:
    """The same with None in the place of what is no number, however deep it lies."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(part) for name, part in value.items()}
    return list(map(finite, value)) if isinstance(value, (list, tuple)) else value
