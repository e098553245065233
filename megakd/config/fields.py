"""One field is one flag: its default, its help, the values that it may have, and who reads it, all in the line that declares it.

    lr: Annotated[float, alias("--learning-rate")] = flag(5e-5, "the student's highest learning rate", range=POSITIVE)
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import tyro

Group = tyro.conf.OmitArgPrefixes  # Group[C]: a field that holds the flags of C, whose names do not begin with the field's
TEMPLATE_HELP = "how an instruction becomes a prompt: alpaca (MiniLLM's), plain, or the path of a .jinja file"
LARGEST_COUNT, LARGEST_NUMBER = 2**31 - 1, 1e30  # what fits into 32 bits, and with room to spare into a float32
LONGEST_NAME, LONGEST_PATH = 255, 3800  # bytes; a path has 4,095, and a run writes into folders within its own
COLDEST = 1e-5  # below it a logit divided by the temperature leaves float32


@dataclass(frozen=True)
class Range:
    """Which numbers fit, and how a message says it. A comparison with NaN is false, and so is one of all with what overflows later."""

    bounds: str
    fits: Callable[[float], bool]
    largest: float | None = None  # None: of its type

    def complaint(self, value: float) -> str | None:
        """What `value` must be, or None where it is that."""
        if not self.fits(value):
            return f"must be {self.bounds}"
        most = self.largest or (LARGEST_COUNT if isinstance(value, int) else LARGEST_NUMBER)
        return f"must be at most {most}" if value > most else None


POSITIVE = Range("above 0", lambda x: x > 0)
NOT_NEGATIVE = Range("at least 0", lambda x: x >= 0)
SHARE = Range("from 0 to 1", lambda x: 0 <= x <= 1)
POSITIVE_SHARE = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
SHARE_BELOW_1 = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
TEMPERATURE = Range(f"at least {COLDEST}", lambda x: x >= COLDEST)
TEMPERATURE_OR_0 = Range(TEMPERATURE.bounds, lambda x: x >= COLDEST or x == 0)  # each command says what it has in place of 0
SEED = Range("at least 0 and below 2**63", lambda x: 0 <= x < 2**63, largest=math.inf)


def flag(default: Any, help: str, *, range: Range | None = None, path: bool = False, read_by: str = "") -> Any:
    """A field that is a flag with this help.

    Args:
        range: of a number, or of each in a tuple; every number has one.
        path: `~` in it is the home folder.
        read_by: the property of a method's page (`MethodConfig`) that the methods have which read it; none: whoever has its group.
    """
    return field(default=default, metadata={"help": help, "range": range, "path": path, "read_by": read_by})


def alias(*names: str) -> Any:
    """Other spellings of a flag: Hugging Face's, MiniLLM's, short ones."""
    return tyro.conf.arg(aliases=names)


def flag_name(name: str) -> str:
    """`max_length` -> `--max-length`."""
    return "--" + name.replace("_", "-")


def alike(name: str, names: Iterable[str]) -> str | None:
    """The name that was probably meant."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def as_words(name: str, value: Any) -> list[str]:
    """A setting as the words of a command line; read from YAML it so meets the same checks."""
    if isinstance(value, (list, tuple)):
        return [flag_name(name), *map(str, value)]
    if isinstance(value, bool):
        return [flag_name(name if value else f"no_{name}")]
    return [flag_name(name), str(value)]


def flags_of(config: Any) -> Iterator[tuple[dataclasses.Field, Any]]:
    """Every flag of a configuration or a group, with its value; groups are dissolved, for no two flags share a name."""
    for line in dataclasses.fields(config):
        value = getattr(config, line.name)
        yield from flags_of(value) if dataclasses.is_dataclass(value) else ((line, value),)


def out_of_range(config: Any) -> Iterator[str]:
    """Numbers outside their range; None (not given) is never."""
    for line, value in flags_of(config):
        for number in value if isinstance(value, (list, tuple)) else [value]:
            bounds = line.metadata.get("range")
            if bounds and number is not None and (complaint := bounds.complaint(number)):
                yield f"{flag_name(line.name)} {number} {complaint}"


def unusable_paths(config: Any) -> Iterator[str]:
    """Paths that no system takes, whatever is there."""
    for line, value in flags_of(config):
        for path in filter(None, [value] if isinstance(value, str) else value or ()) if line.metadata.get("path") else ():
            if complaint := path_complaint(path):
                yield f"{flag_name(line.name)} {path[:60]!r}{'...' if len(path) > 60 else ''} {complaint}"


def path_complaint(path: str) -> str | None:
    """What is wrong with a path as such."""
    try:
        data = os.fsencode(path)
    except UnicodeEncodeError:
        return "holds half of a character; give a path of whole ones"
    if b"\0" in data:
        return "holds a NUL character, which no path has; take it out"
    if (longest := max(map(len, data.split(b"/")))) > LONGEST_NAME:
        return f"has a name of {longest:,} bytes, and the longest that a file may have is {LONGEST_NAME}; give a shorter one"
    return f"has {len(data):,} bytes, and a path at most {LONGEST_PATH:,}; give a shorter one" if len(data) > LONGEST_PATH else None
