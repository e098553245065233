"""Whose folder it is: a command fills a folder that is new, empty, or its own, which a marker in it says, and no other.

    megakd.json    {"made_by": "pretrain_kd.py", "megakd": "0.1.0"}

Files of people's own with the names that a command writes (samples.jsonl, results.json) are so never replaced.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import megakd
from megakd.errors import UserError, file_errors, read_json

MARKER = "megakd.json"
LOGS = (".log", ".out", ".err")  # a shell or a scheduler has opened them before the command starts


@dataclass(frozen=True)
class OwnFolder:
    """The folder that `flag` of the command `made_by` names."""

    path: Path
    made_by: str
    flag: str = "--save"

    def check(self, *, is_older: Callable[[Path], bool] = lambda path: False) -> bool:
        """Whether the command has been at work here; False where the folder is new or empty.

        is_older: recognises what the command made before there were markers.

        Raises:
            UserError: it is somebody else's, or a file, or cannot be written; nothing is left behind.
        """
        check_can_write(self.path, flag=self.flag)
        found = self._held()
        maker = marked_by(self.path / MARKER)
        if maker not in (None, self.made_by):
            raise UserError(f"{self.flag} {self.path} is a folder of {maker}; give {self.made_by} one of its own")
        if found and maker is None and not is_older(self.path):
            raise UserError(
                f"{self.flag} {self.path} holds {found[0]}, and no {MARKER} says that {self.made_by} made it; give a new or an empty folder"
            )
        return bool(found)

    def claim(self) -> None:
        """Make the folder, and mark it before anything else is written into it."""
        with file_errors(self.path, flag=self.flag):
            self.path.mkdir(parents=True, exist_ok=True)
        mark(self.path / MARKER, self.made_by)

    def _held(self) -> list[str]:
        """What is in the folder, without hidden files and logs."""
        try:
            with file_errors(self.path, flag=self.flag):
                names = sorted(os.listdir(self.path)) if self.path.exists() else []
        except UserError:
            if self.path.exists():
                raise
            names = []  # rank 0 has just tried whether it can be made, and taken it back
        return [name for name in names if not name.startswith(".") and not name.endswith(LOGS)]


def mark(file: Path, made_by: str, **more: object) -> None:
    """Write a marker: which command is at work, of which version, and what else it wants to find again."""
    write_text(file, json.dumps({"made_by": made_by, "megakd": megakd.__version__, **more}, indent=2) + "\n")


def marked_by(file: Path) -> str | None:
    """The command that wrote a marker; None where there is none.

    Raises:
        UserError: the marker is damaged.
    """
    if not file.is_file():
        return None
    content = read_json(file, way_out="remove the file if the folder is to be used")
    if not isinstance(content, dict) or not isinstance(content.get("made_by"), str):
        raise UserError(f"{file}: names no command as its maker; give a new or an empty folder")
    return content["made_by"]


def check_can_write(folder: Path, *, flag: str) -> None:
    """That the folder can be made and written into: by doing it, on rank 0 alone, and taking it back.

    Raises:
        UserError: it cannot, and why.
    """
    for place in (folder, *folder.absolute().parents):
        if place.is_file():
            under = "" if place == folder else f", and {folder} cannot lie under it"
            raise UserError(f"{flag} {place} is a file{under}; give a folder of its own")
    if os.environ.get("RANK", "0") != "0":
        return
    made = missing_parents(folder / MARKER)
    try:
        with file_errors(folder, flag=flag):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".megakd.") as file:
                file.write(b"\n")
    finally:
        remove_empty(made)


# ---- small files, written whole


def hidden(target: Path) -> Path:
    """Where `target` is written until it is whole."""
    return target.with_name(f".{target.name}.partial")


def write_text(file: Path, text: str) -> None:
    """Replace a small file in one step.

    Raises:
        UserError: it cannot be written, and why.
    """
    partial = hidden(file)
    with file_errors(file):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)


def missing_parents(target: Path) -> list[Path]:
    """The parents that do not exist yet, the innermost first."""
    return [parent for parent in target.absolute().parents if not parent.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Those that were made in vain, the innermost first."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
