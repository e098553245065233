"""JSON values of a file, one after the other: one a line (.jsonl), or the elements of one list (alpaca_data.json).

What Python's reader lets pass and JSON does not have, NaN and infinity, is refused.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from megakd.data.text_files import MOST_LINE, PIECE, read_lines, read_pieces
from megakd.data.values import short
from megakd.errors import UserError

SPACES = re.compile(r"[ \t\n\r]*")


def json_records(path: Path) -> Iterator[tuple[str, object]]:
    """Where each value stands, "line 7" or "row 7", and the value. A list is told from lines by its first sign; blank lines count.

    Raises:
        UserError: the file cannot be read, or is not JSON; with the line.
    """
    begins = next((piece.lstrip() for piece in read_pieces(path) if piece.strip()), "")
    return list_records(path) if begins.startswith("[") else line_records(path)


def line_records(path: Path) -> Iterator[tuple[str, object]]:
    """One value a line."""
    for number, line in read_lines(path):
        if line.strip():
            yield f"line {number}", line_value(line.strip(), f"{path} line {number}")


def line_value(line: str, where: str) -> object:
    """What the line holds."""
    try:
        return DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{where} is not JSON ({reason(error)}{place}): {short(line)}; fix it") from error


def list_records(path: Path) -> Iterator[tuple[str, object]]:
    """The elements of a list, counted from 1."""
    text = ListText(path)
    text.take("[")
    number, more = 0, text.sign() != "]" or text.take("]") != "]"
    while more:
        number += 1
        yield f"row {number}", text.take_value()
        more = text.take(",]") == ","
    if text.sign():
        text.refuse(f"{short(text.sign())} stands after the end of the list")


class ListText:
    """The text of a JSON file, of which no more is in memory than is needed: what has been taken is forgotten.

    Raises:
        UserError: it is not JSON; with the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pieces = read_pieces(path)
        self._text, self._at, self._line = "", 0, 1  # in memory; how much of it is taken; the line in which it begins

    def sign(self) -> str:
        """The next character that is no space; none at the end."""
        while True:
            self._at = SPACES.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(PIECE):
                return ""

    def take(self, signs: str) -> str:
        """The next character, which is one of `signs`."""
        sign = self.sign()
        if not sign or sign not in signs:
            self.refuse(f"{sign or 'the end of the file'} stands where {' or '.join(signs)} should")
        self._at += 1
        return sign

    def take_value(self) -> object:
        """The next value; as much is read as it takes."""
        self.sign()
        size = PIECE
        while True:
            try:
                value, self._at = DECODER.raw_decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:  # wrong, or not all there yet
                if len(self._text) - self._at > MOST_LINE:
                    self.refuse(f"{error.msg}, or a row of more than {MOST_LINE:,} characters")
                if not self._read(size):
                    self._at = error.pos
                    self.refuse(error.msg)
                size *= 2
            except (ValueError, RecursionError) as error:
                self.refuse(reason(error))

    def refuse(self, what: str) -> NoReturn:
        """The place is the line of what would be taken next."""
        line = self._line + self._text.count("\n", 0, self._at)
        raise UserError(f"{self.path} line {line} is not JSON ({what}); fix it")

    def _read(self, size: int) -> bool:
        """Whether there was more."""
        more = []
        while sum(map(len, more)) < size and (piece := next(self._pieces, "")):
            more.append(piece)
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :] + "".join(more), 0
        return bool(more)


def reason(error: Exception) -> str:
    """Why Python's reader gave up."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    if isinstance(error, RecursionError):
        return "lists or objects within each other, too many to be read"
    return str(error).split(":")[0]


def no_constant(name: str) -> NoReturn:
    """NaN, Infinity, -Infinity."""
    raise ValueError(f"{name} is no number")


def finite(digits: str) -> float:
    """A fraction, unless it is beyond the largest."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{short(digits)} is too large a number")
    return value


DECODER = json.JSONDecoder(parse_constant=no_constant, parse_float=finite)
