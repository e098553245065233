"""What the fields of a record may hold: what JSON in UTF-8 can say, so that it can be tokenized, kept and written again.

Everything is looked at where it is read, fields too that no one but `generate.py` will touch.
"""

import json
import re

from megakd.errors import UserError

FORMS = "prompt with response (or output), instruction with output, question with answer, messages, or text"
MOST_TEXT = 4 * 2**20  # characters of one text, a few seconds of a tokenizer; no model reads so much
MOST_LEVELS = 100  # of lists and objects within each other; Python's own writer gives up at about a thousand
BROKEN = re.compile("[\0\ud800-\udfff]")  # NUL, and half of a surrogate pair


def check_record(fields: object, where: str) -> dict:
    """The fields.

    Raises:
        UserError: it is no object, or a field holds what no text does; with the field.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{where} is {shown(fields)}, not a JSON object; it needs {FORMS}")
    for name, value in fields.items():
        check_text(name, f"{where}: the name of a field")
        check_value(value, f"{where}: field {name}")
    return fields


def check_value(value: object, what: str) -> None:
    """Every text in the value, whatever lists and objects it is in; level by level, for a call within a call would end somewhere."""
    level = [value]
    for _ in range(MOST_LEVELS):
        within = []
        for part in level:
            if isinstance(part, str):
                check_text(part, what)
            elif isinstance(part, dict):
                within += [*part, *part.values()]
            elif isinstance(part, list):
                within += part
        if not (level := within):
            return
    raise UserError(f"{what} has more than {MOST_LEVELS} lists or objects within each other; take it out")


def check_text(text: str, what: str) -> None:
    """Refuses characters that no UTF-8 text has, and what is too long to be tokenized."""
    if len(text) > MOST_TEXT:
        raise UserError(f"{what} has {len(text):,} characters, and a text at most {MOST_TEXT:,}; cut it, or take it out")
    broken = None if text.isascii() and "\0" not in text else BROKEN.search(text)
    if broken:
        name = "NUL" if broken[0] == "\0" else "half a surrogate pair, an emoji cut in two"
        raise UserError(f"{what} holds U+{ord(broken[0]):04X} ({name}) at character {broken.start() + 1}; take it out")


def shown(value: object) -> str:
    """A value as JSON, shortened."""
    return short(json.dumps(value, default=str))


def short(text: str) -> str:
    """60 characters at most, all of which can be shown, for messages."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:61])
    return text if len(text) <= 60 else text[:57] + "..."


def first_difference(one: str, other: str) -> int:
    """Where two texts part."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def excerpt(text: str, at: int) -> str:
    """Some text before and after a place."""
    first, last = max(0, at - 20), at + 30
    return ("..." if first else "") + repr(text[first:last]) + ("..." if last < len(text) else "")
