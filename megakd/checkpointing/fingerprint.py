"""Of what a file was made, as checksums: of data, of a template, of a model.

Data and template are read whole. Of a model every small file is, and of each file of weights its size and 64 pieces of 64 KiB from its
first byte to its last: seconds for any model, and no training or conversion leaves all of those pieces as they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megakd.checkpointing.export_hf import REPORT
from megakd.checkpointing.native import find_iteration, is_native
from megakd.errors import file_errors
from megakd.models.hub_cache import local_folder

PIECES, PIECE_BYTES = 64, 1 << 16
OF_A_MODEL = (".json", ".safetensors", ".bin", ".model", ".txt", ".tiktoken", ".jinja")


def model_files(folder: Path) -> list[Path]:
    """Of a Hugging Face folder what may be read of it, of a native checkpoint its iteration."""
    folder = local_folder(folder, flag="--model")
    if is_native(folder):
        return all_files(find_iteration(folder, flag="--model"))
    files = [file for file in all_files(folder, "*") if file.suffix in OF_A_MODEL and file.name != REPORT]
    return files + (all_files(folder, "mp*/*.bin") if folder.is_dir() else [])


def all_files(path: Path, pattern: str = "**/*") -> list[Path]:
    """In the order of their names; a file is its own list."""
    with file_errors(path):
        return sorted(file for file in path.glob(pattern) if file.is_file()) if path.is_dir() else [path]


def checksum(files: Iterable[Path], *, whole: bool) -> str:
    """Over names and contents, or where that is too much over pieces of them."""
    digest = hashlib.sha256()
    for file in files:
        with file_errors(file), file.open("rb") as stream:
            size = file.stat().st_size
            digest.update(f"{file.name if not whole else ''}\0{size}\0".encode())
            for start in range(0, size, PIECE_BYTES) if whole or size <= PIECES * PIECE_BYTES else starts(size):
                stream.seek(start)
                digest.update(stream.read(PIECE_BYTES))
    return digest.hexdigest()


def starts(size: int) -> list[int]:
    """Of pieces spread evenly from the first byte to the last."""
    return [(size - PIECE_BYTES) * i // (PIECES - 1) for i in range(PIECES)]
