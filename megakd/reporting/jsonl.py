"""A file of one JSON object a line, each with its iteration, that can be taken up again after an interruption."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class JsonLines:
    """Appends objects to `path`. Lines after `resumed_iteration` are removed first; all of them where it is None (a new run)."""

    def __init__(self, path: Path, *, resumed_iteration: int | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resumed_iteration is None else [row for row in read_jsonl(path) if row["iteration"] <= resumed_iteration]
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("".join(map(dump, kept)), encoding="utf-8")
        os.replace(beside, path)  # an interruption here leaves the old file or the new one, never half of one
        self._file = path.open("a", buffering=1, encoding="utf-8")  # line-buffered: a killed run keeps every finished line

    def append(self, iteration: int, values: Mapping[str, Any]) -> None:
        """One line; `iteration` comes first in it."""
        self._file.write(dump({"iteration": iteration, **values}))

    def close(self) -> None:
        """Nothing is kept back until then: lines are written one by one."""
        self._file.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file JsonLines wrote; none where there is no file. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")  # a finished line ends with a newline
    return [json.loads(line) for line in lines]


def dump(values: Mapping[str, Any]) -> str:
    """One line. NaN and infinity, which JSON does not have, become null."""
    finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}
    return json.dumps(finite, allow_nan=False, ensure_ascii=False) + "\n"
