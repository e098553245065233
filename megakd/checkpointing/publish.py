"""Written beside, then renamed: a folder is seen whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megakd.errors import UserError


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to write in; it becomes `target` when the block ends well and disappears when it does not.

    An older `target` stays readable until the new one takes its name.
    """
    made = missing_parents(target)
    folder = hidden(target)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        folder.mkdir(parents=True)
        yield folder
        take_name(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(made)
        raise


def hidden(target: Path) -> Path:
    """Where `target` is written until it is whole."""
    return target.with_name(f".{target.name}.partial")


def take_name(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, in place of what was there."""
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def missing_parents(target: Path) -> list[Path]:
    """The parents that do not exist yet, the innermost first."""
    return [parent for parent in target.absolute().parents if not parent.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def write_text(file: Path, text: str) -> None:
    """Replace a small file in one step."""
    partial = hidden(file)
    partial.write_text(text)
    os.replace(partial, file)


def check_target(target: Path, *, force: bool, ours: Callable[[Path], bool], what: str) -> None:
    """Refuse to write over something; `--force` replaces what `ours` recognises, and nothing else.

    Raises:
        UserError: the target is a file, or a folder with something in it.
    """
    if target.is_file():
        raise UserError(f"--save {target}: is a file; give a folder")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise UserError(f"--save {target}: exists and is not empty; give another folder, or --force to replace it")
    if not ours(target):
        raise UserError(
            f"--save {target}: holds something else than {what}, which --force does not replace; give another folder"
        )
