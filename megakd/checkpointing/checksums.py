"""checksums.sha256: of every file of a checkpoint, as `sha256sum -c` reads it. Written with it, compared before it is loaded.

Each rank reads a share: of torch_dist's files those with its number, which it has written itself and so reads back from memory.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from megakd.errors import UserError, file_errors
from megakd.reporting.own_folder import write_text

CHECKSUMS = "checksums.sha256"
SHARD = re.compile(r"__(\d+)_\d+\.distcp")
LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def owner(name: str, ranks: int) -> int:
    """The rank whose share a file is."""
    found = SHARD.fullmatch(name)
    return int(found[1]) % ranks if found else 0


def checksums(folder: Path, *, rank: int = 0, ranks: int = 1) -> dict[str, str]:
    """Of this rank's share of the folder's files, by their names in it."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {name: sha256(folder / name) for name in names if owner(name, ranks) == rank}


def write_checksums(folder: Path, found: dict[str, str]) -> None:
    """Those of all ranks together, as the folder's last file."""
    write_text(folder / CHECKSUMS, "".join(f"{found[name]}  {name}\n" for name in sorted(found)))


def read_checksums(folder: Path) -> dict[str, str]:
    """By file; every one of them is there.

    Raises:
        UserError: one is not, or the list is damaged or missing.
    """
    file = folder / CHECKSUMS
    with file_errors(file, way_out="copy the checkpoint again"):
        *text, end = file.read_text(encoding="utf-8").split("\n")
    lines = [*map(LINE.fullmatch, text), *([None] if end or not text else [])]
    if None in lines:
        raise UserError(f"{file}: line {lines.index(None) + 1} is no checksum; it is damaged, copy the checkpoint again")
    listed = {line[2]: line[1] for line in lines}
    if missing := next((name for name in listed if not is_within(folder, name)), None):
        raise UserError(f"{folder / missing}: {CHECKSUMS} lists it, but it is not there; copy the checkpoint again")
    return listed


def is_within(folder: Path, name: str) -> bool:
    """Whether it names a file of the folder."""
    return os.path.normpath(name) == name and not name.startswith(("/", "..")) and (folder / name).is_file()


def verify(folder: Path, *, rank: int = 0, ranks: int = 1) -> None:
    """Compare this rank's share.

    Raises:
        UserError: a file is not what was written, by its name.
    """
    _compare(folder, lambda name: owner(name, ranks) == rank)


def verify_beside_tensors(folder: Path) -> None:
    """Compare every file but those of tensors: index, descriptions, tokenizer; a few megabytes.

    Raises:
        UserError: a file is not what was written, by its name.
    """
    _compare(folder, lambda name: not SHARD.fullmatch(name))


def _compare(folder: Path, is_asked_for: Callable[[str], bool]) -> None:
    for name, expected in read_checksums(folder).items():
        if is_asked_for(name) and sha256(folder / name) != expected:
            raise UserError(f"{folder / name}: damaged, its checksum is not that in {CHECKSUMS}; copy the checkpoint again")


def sha256(file: Path) -> str:
    """In hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    with file_errors(file, way_out="copy the checkpoint again"), file.open("rb", buffering=0) as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
