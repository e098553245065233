"""Text of a UTF-8 file, packed with gzip or not, a line or a piece at a time: a file is never in memory as a whole."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megakd.errors import UserError, check_file, file_errors

GZIP = b"\x1f\x8b"
PIECE = 2**16  # characters
MOST_LINE = 16 * 2**20  # characters; what is longer is no line of text, and would be in memory as a whole


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line, newline included. A byte-order mark is left out; CRLF and CR are newlines, U+2028 is none.

    Raises:
        UserError: the file cannot be read or unpacked, or a line is not UTF-8, or longer than MOST_LINE.
    """
    number = 0
    with open_text(path) as text:
        while line := text.readline(MOST_LINE + 1):
            number += 1
            check_utf8(line, path, number)
            if len(line) > MOST_LINE:
                raise UserError(f"{path} line {number} has more than {MOST_LINE:,} characters; give one row a line, or take it out")
            yield number, line


def read_pieces(path: Path) -> Iterator[str]:
    """The same text, whatever its lines are."""
    number = 1
    with open_text(path) as text:
        while piece := text.read(PIECE):
            check_utf8(piece, path, number)
            yield piece
            number += piece.count("\n")


@contextmanager
def open_text(path: Path) -> Iterator[io.TextIOWrapper]:
    """The file, unpacked where it begins as gzip's files do, whatever its name."""
    check_file(path)
    try:
        with file_errors(path), path.open("rb") as file:
            packed = file.peek(len(GZIP)).startswith(GZIP)
            yield io.TextIOWrapper(gzip.GzipFile(fileobj=file) if packed else file, encoding="utf-8-sig", errors="surrogateescape")
    except (EOFError, zlib.error) as error:
        raise UserError(f"{path}: the packed file is cut off or damaged ({error}); copy or download it again") from error


def check_utf8(text: str, path: Path, number: int) -> None:
    """Refuses a byte that is not UTF-8, which was read as a lone surrogate, and NUL; `text` begins in line `number`."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        place = f"{path} line {number + text.count(chr(10), 0, error.start)}"
        raise UserError(f"{place}: byte 0x{ord(text[error.start]) & 0xFF:02x} is not UTF-8; convert the file to UTF-8") from error
    if "\0" in text:
        place = f"{path} line {number + text.count(chr(10), 0, text.index(chr(0)))}"
        raise UserError(f"{place} holds a NUL byte, which no text does; convert the file to UTF-8, or take the line out")
