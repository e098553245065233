"""The files of a folder that somebody else made: what an index or a link in it names lies in it, or it is not read.

The hub's cache alone is made of links that lead out, into its own blobs: models--org--name/snapshots/<revision>/config.json leads to
models--org--name/blobs/<hash>.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from megakd.errors import UserError, check_file, refuse_lfs_pointer

MOST_SMALL = 256 * 2**20  # bytes of a file that is no weights'; the largest tokenizers have 35 MiB
SMALL_FILES = (  # what is beside the weights, and goes with a model wherever it goes
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


def check_inside(file: Path, folder: Path, *, flag: str = "") -> None:
    """The file lies in the folder, links followed, or among the blobs of a hub's cache.

    Raises:
        UserError: it does not.
    """
    home, real = Path(os.path.realpath(folder)), Path(os.path.realpath(file))
    if not (real.is_relative_to(home) or real.match("models--*/blobs/*")):
        raise UserError(f"{f'{flag} {file}'.strip()}: leads to {real}, outside its folder; copy that file into the folder")


def file_in(folder: Path, name: object, *, named_by: Path, flag: str = "") -> Path:
    """The file of a name that an index gives.

    Raises:
        UserError: it is no name of a file beside the index, or leads out of the folder.
    """
    said = f"{flag} {named_by}".strip()
    if not (isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..") and "\0" not in name):
        raise UserError(f"{said}: names the file {str(name)[:80]!r}, and only one beside it can be meant; copy or download it again")
    check_inside(folder / name, folder, flag=flag)
    return folder / name


def small_files(folder: Path, *, flag: str = "") -> list[Path]:
    """All but the weights of a model's folder.

    Raises:
        UserError: one leads out of the folder, is too large, no regular file, or a pointer that git left.
    """
    found = sorted({path for pattern in SMALL_FILES for path in folder.glob(pattern)})
    return list(_checked((path for path in found if not path.is_dir()), folder, flag))


def _checked(files: Iterator[Path], folder: Path, flag: str) -> Iterator[Path]:
    for file in files:
        check_inside(file, folder, flag=flag)
        check_file(file, most=MOST_SMALL, flag=flag, way_out="give the folder that save_pretrained wrote")
        refuse_lfs_pointer(file, flag=flag)
        yield file
