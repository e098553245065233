"""Written beside, then renamed: a folder is seen whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megakd.errors import UserError, file_errors
from megakd.reporting.own_folder import check_can_write, hidden, missing_parents, remove_empty


@contextmanager
def published(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to write in; it becomes `target` when the block ends well and disappears when it does not.

    An older `target` stays readable until the new one takes its name.

    Raises:
        UserError: the disk is full, or refuses; or another command writes the same target and took the hidden folder away.
    """
    made = missing_parents(target)
    folder = hidden(target)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    try:
        with writing(target):
            folder.mkdir(parents=True)
            yield folder
            take_name(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        remove_empty(made)
        raise


@contextmanager
def system_errors() -> Iterator[None]:
    """What the system says of a file, where torch's writer hides it behind "unexpected pos 704 vs 598"."""
    try:
        yield
    except RuntimeError as error:
        said: BaseException | None = error
        while said is not None and not isinstance(said, OSError):
            said = said.__cause__ or said.__context__
        if said is None:
            raise
        raise said from error


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """What goes wrong with the files of a folder that is being published is told with the folder's name; other files tell of themselves."""
    folder = hidden(target)
    try:
        with system_errors():
            yield
    except OSError as error:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if names and not any(name.startswith((str(folder), str(target))) for name in names):
            raise
        if isinstance(error, FileNotFoundError) and not folder.exists():
            raise UserError(f"{target}: another command writes it too, and took away what was half-written; run one at a time") from error
        with file_errors(target):
            raise


def take_name(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`, in place of what was there."""
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def remove_left_behind(*folders: Path) -> None:
    """What runs that were killed while they wrote have left in these folders, under hidden names."""
    for path in (path for folder in folders for kind in ("partial", "replaced") for path in folder.glob(f".*.{kind}")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_target(target: Path, *, force: bool, ours: Callable[[Path], bool], what: str) -> None:
    """Refuse to write over something; `--force` replaces what `ours` recognises, and nothing else.

    Raises:
        UserError: the target is a file, or a folder with something in it, or cannot be written.
    """
    check_can_write(target, flag="--save")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise UserError(f"--save {target}: exists and is not empty; give another folder, or --force to replace it")
    if not ours(target):
        raise UserError(
            f"--save {target}: holds something else than {what}, which --force does not replace; give another folder"
        )
