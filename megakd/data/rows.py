"""From a file to rows of text. Every reader of data starts here, and every complaint about a file is made here.

    *.jsonl  one object a line, with the fields of one of these
               prompt, response                   as they are
               prompt, output                     MiniLLM's files: the prompt is rendered already
               instruction, input, output         rendered with the Alpaca template; input may be missing or ""
               question, answer                   GSM8K's files: the question is the instruction
               text                               plain text: no prompt, every token is learnt
             A response or output is one text or a list of right ones. It may be missing where only prompts are wanted.
    *.txt    plain text; a blank line ends a document
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megakd.data.templates import render_prompt

FORMS = "prompt with response (or output), instruction with output, question with answer, or text"


@dataclass(frozen=True)
class Row:
    """One row of a data file."""

    where: str  # "train.jsonl line 7", for messages
    prompt: str  # "" for plain text
    references: tuple[str, ...]  # right responses, the first is the one to learn; none in a file of prompts


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a .jsonl or .txt file. Raises ValueError naming file, line, value and way out where one cannot be used."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such data file; give the path of a .jsonl or .txt file")
    rows = list(_text_rows(path) if path.suffix == ".txt" else _json_rows(path))
    if not rows:
        raise ValueError(f"{path} is empty; it needs one JSON object a line with {FORMS}")
    return rows


def _text_rows(path: Path) -> Iterator[Row]:
    documents = re.split(r"\n\s*\n", _read_text(path))
    for number, document in enumerate(documents, start=1):
        if document.strip():
            yield Row(f"{path} document {number}", "", (document.strip("\n"),))


def _json_rows(path: Path) -> Iterator[Row]:
    for where, fields in json_objects(path):
        yield _row(fields, where)


def json_objects(path: Path) -> Iterator[tuple[str, dict]]:
    """Where each object of a jsonl file stands (as in `Row.where`), and its fields."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # not splitlines: U+2028 may stand inside a string
        if line.strip():
            where = f"{path} line {number}"
            yield where, _json_object(line, where)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8; convert the file to UTF-8") from error


def _json_object(line: str, where: str) -> dict:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg} at column {error.colno}): {_short(line)}; fix it") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is {_short(line)}, not a JSON object; it needs {FORMS}")
    return fields


def _row(fields: dict, where: str) -> Row:
    if "prompt" in fields:
        prompt = _string(fields, "prompt", where)
    elif "instruction" in fields:
        prompt = render_prompt(_string(fields, "instruction", where), _string(fields, "input", where))
    elif "question" in fields:
        prompt = render_prompt(_string(fields, "question", where))
    elif "text" in fields:
        return Row(where, "", (_string(fields, "text", where),))
    else:
        raise ValueError(f"{where} has the fields {_short(', '.join(fields))}; it needs {FORMS}")
    return Row(where, prompt, _references(fields, where))


def _references(fields: dict, where: str) -> tuple[str, ...]:
    name = next((name for name in ("response", "output", "answer") if name in fields), "output")
    value = fields.get(name, [])
    if isinstance(value, list) and all(isinstance(reference, str) for reference in value):
        return tuple(value)
    return (_string(fields, name, where, expected="a text or a list of texts"),)


def _string(fields: dict, name: str, where: str, expected: str = "a text") -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name} is {_short(json.dumps(value))}; it must be {expected}")
    return value


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
