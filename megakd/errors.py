"""A user's mistake is one line; every other exception keeps its traceback.

A UserError names the flag or file, the value it met, and a way out. It is raised where the mistake is found, and told by the
command alone (`told_in_one_line`): a ValueError of torch or of megatron-core is nobody's mistake but ours, and is shown whole.
"""

from __future__ import annotations

import errno
import json
import os
import select
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from pathlib import Path
from typing import NoReturn

LFS_POINTER = b"version https://git-lfs"  # what git leaves in place of a large file that it did not fetch
GRACE_SECONDS = 3.0  # the launcher ends all ranks a moment after the first has ended
LONGEST = 1600  # characters of a message; the way out stands at its end
MOST_JSON = 64 * 2**20  # bytes: the index of the largest models has 9 MiB
INTERRUPTED = 130  # the exit code that shells give to Ctrl-C
UNREAD = 141  # the same, to a command whose reader has gone
WAYS_OUT = {  # of what the system says about a file
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of a file's size",
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.EROFS: "give a path that can be written",
    errno.ENOENT: "check the path",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder",
}


class UserError(ValueError):
    """What a user can mend: the one exception that becomes one line, whatever stands in the names that it quotes."""

    code = 2  # what a command that it ends exits with

    def __init__(self, message: str):
        line = message.replace("\n", "\\n")
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")


class LostRankError(UserError):
    """Another rank has ended or stands still: the same command again may do."""

    code = 75  # EX_TEMPFAIL


@contextmanager
def file_errors(path: str | Path, *, flag: str = "", way_out: str = "") -> Iterator[None]:
    """What goes wrong with a file in the block is told with its name: `flag path: what happened; way out`.

    Raises:
        UserError: the system refuses the file, or it is not UTF-8, or not JSON.
    """
    name = f"{flag} {path}".strip()
    try:
        yield
    except OSError as error:
        way = way_out or WAYS_OUT.get(error.errno, "check the path and the disk")
        raise UserError(f"{name}: {error.strerror or error}; {way}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: byte {error.start} is not UTF-8; {way_out or 'convert the file to UTF-8'}") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{name}: not JSON ({error.msg} at {place}); {way_out or 'copy or download it again'}") from error
    except RecursionError as error:
        raise UserError(f"{name}: nested too deeply to be read; {way_out or 'copy or download it again'}") from error


def check_file(path: Path, *, most: float = float("inf"), flag: str = "", way_out: str = "give the file that was meant") -> None:
    """It can be opened without waiting, and read without filling the memory: a regular file of at most `most` bytes.

    Raises:
        UserError: it is not.
    """
    name = f"{flag} {path}".strip()
    with file_errors(path, flag=flag):
        state = path.stat()
    if not (stat.S_ISREG(state.st_mode) or stat.S_ISDIR(state.st_mode)):  # that it is a folder is told where it is opened
        raise UserError(f"{name}: is a pipe, a device or a socket, and a regular file is needed; give one")
    if state.st_size > most:
        raise UserError(f"{name}: {state.st_size:,} bytes, and such a file has at most {most:,}; {way_out}")


def read_text(path: Path, *, most: int, encoding: str = "utf-8", flag: str = "", way_out: str = "") -> str:
    """The text of a file of at most `most` bytes.

    Raises:
        UserError: it is larger, or cannot be read.
    """
    check_file(path, most=most, flag=flag)
    with file_errors(path, flag=flag, way_out=way_out):
        return path.read_text(encoding=encoding)


def read_json(path: Path, *, flag: str = "", way_out: str = "") -> object:
    """What a JSON file holds.

    Raises:
        UserError: it cannot be read, and why.
    """
    text = read_text(path, most=MOST_JSON, flag=flag, way_out=way_out)
    with file_errors(path, flag=flag, way_out=way_out):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # a number of more digits than Python converts
            raise UserError(f"{f'{flag} {path}'.strip()}: {said(error)}; {way_out or 'copy or download it again'}") from error


def said(error: Exception) -> str:
    """What another library says went wrong, on one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def refuse_lfs_pointer(path: Path, *, flag: str = "") -> None:
    """
    Raises:
        UserError: the file cannot be read, or is a Git LFS pointer to what it should hold.
    """
    check_file(path, flag=flag)
    with file_errors(path, flag=flag), path.open("rb") as stream:
        pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
    if pointer:
        raise UserError(f"{f'{flag} {path}'.strip()}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")


@contextmanager
def told_in_one_line(*, interrupted: str = "interrupted") -> Iterator[None]:
    """Around a whole command: a UserError, and Ctrl-C, end it with one line; a reader that has gone ends it without."""
    with quiet_pipe():
        try:
            yield
        except UserError as error:
            fail(str(error), code=error.code)
        except KeyboardInterrupt:
            fail(interrupted, code=INTERRUPTED)


@contextmanager
def quiet_pipe() -> Iterator[None]:
    """Around what prints and may end the command: a reader that has seen enough (`--help | head`) is no error, and hides none."""
    try:
        yield
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        if is_read() or getattr(end, "code", None):
            raise
        sys.exit(UNREAD)


def is_read() -> bool:
    """Whether anybody reads what is printed; if not, what Python still has to print goes nowhere."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    try:
        pipe = sys.stdout.fileno()
    except UnsupportedOperation:  # it is no file
        return True
    state = select.poll()
    state.register(pipe, 0)
    if not any(event & select.POLLERR for _, event in state.poll(0)):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), pipe)
    return False


def tell(message: str) -> None:
    """What is no mistake but worth knowing, in one line from rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {message}", file=sys.stderr, flush=True)


def fail(message: str, *, code: int = 2) -> NoReturn:
    """One line, and exit `code` on every rank.

    A mistake that all ranks find is told by rank 0 alone: its end ends the others within the grace that they give it. One that rank
    0 does not share (a file that only another machine lacks) is told by whoever has it.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(GRACE_SECONDS)
    print(f"error: {message}" if rank == "0" else f"error on rank {rank}: {message}", file=sys.stderr, flush=True)
    sys.exit(code)
