"""From records to rows of text: a prompt, and its right responses.

    prompt, response                   as they are
    prompt, output                     MiniLLM's files: the prompt is rendered already
    instruction, input, output         rendered with --prompt-template; input may be missing or ""
    question, answer                   GSM8K's files: the question is the instruction
    messages                           a chat: the assistant's last turn is the response, the tokenizer renders the others
    text                               plain text: no prompt, every token is learnt

A response or output is one text or a list of right ones. It may be missing where only prompts are wanted.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.data.chat import split_messages
from megakd.data.records import FORMS, records, short
from megakd.data.templates import open_template
from megakd.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row of a data file."""

    where: str  # "train.jsonl line 7", for messages
    prompt: str  # "" for plain text
    references: tuple[str, ...]  # right responses, the first is the one to learn; none in a file of prompts


def read_rows(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, *, template: str = "alpaca") -> list[Row]:
    """All rows of a file or dataset folder; `messages` need the tokenizer.

    Raises UserError naming file, line, value and way out where one cannot be used.
    """
    render = open_template(template)
    rows = [row_of(fields, where, render, tokenizer) for where, fields in records(Path(path))]
    if not rows:
        raise UserError(f"{path} is empty; it needs one JSON object a line with {FORMS}")
    return rows


def row_of(fields: dict, where: str, render: Callable[[str, str], str], tokenizer: PreTrainedTokenizerBase | None) -> Row:
    """The first of the forms above that the fields have. Raises UserError where they have none, or a value is no text."""
    if "prompt" in fields:
        prompt = string(fields, "prompt", where)
    elif "instruction" in fields:
        prompt = render(string(fields, "instruction", where), string(fields, "input", where))
    elif "question" in fields:
        prompt = render(string(fields, "question", where), "")
    elif "messages" in fields:
        return Row(where, *split_messages(fields["messages"], tokenizer, where))
    elif "text" in fields:
        return Row(where, "", (string(fields, "text", where),))
    else:
        raise UserError(f"{where} has the fields {short(', '.join(fields))}; it needs {FORMS}")
    return Row(where, prompt, references(fields, where))


def references(fields: dict, where: str) -> tuple[str, ...]:
    """One text or a list of them under response, output or answer; none where all three are missing."""
    name = next((name for name in ("response", "output", "answer") if name in fields), "output")
    value = fields.get(name, [])
    if isinstance(value, list) and all(isinstance(reference, str) for reference in value):
        return tuple(value)
    return (string(fields, name, where, expected="a text or a list of texts"),)


def string(fields: dict, name: str, where: str, expected: str = "a text") -> str:
    """A field's text, "" where it is missing. Raises UserError where it is something else than `expected`."""
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name} is {short(json.dumps(value, default=str))}; it must be {expected}")
    return value
