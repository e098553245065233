"""Where an answer ends: one decision, from the files that `generate` of transformers reads, for whoever writes or teaches answers.

    stop     generation_config.json's eos_token_id, one id or a list; without that file config.json's: generate stops at each of them
    taught   the tokenizer's eos_token where it is one of these, else the first of them: what follows a response of the data

Where that file names no id that the tokenizer has, generate would never end; then config.json decides, then the tokenizer's
eos_token, and a checkpoint of training writes the decision into its copy of the file. So `generate` on an export ends where we do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.errors import UserError, read_json

FILES = ("generation_config.json", "config.json")  # generate looks at the first that is there, and at no other
FIELD = "eos_token_id"


@dataclass(frozen=True)
class EndIds:
    """`stop`: each of these ids ends a response that is written. `taught`: the one that training puts behind a response."""

    stop: tuple[int, ...]
    taught: int

    def joined(self, other: EndIds) -> EndIds:
        """Also at the ends of another model, whose habit the first is going to learn."""
        return EndIds(tuple(dict.fromkeys((*self.stop, *other.stop))), self.taught)

    def without_end(self, response: Sequence[int]) -> Sequence[int]:
        """The response alone; one that was cut off has no end to take away."""
        return response[:-1] if len(response) and response[-1] in self.stop else response

    def line(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """For the log: `responses end with '</s>' (2)`, and what else ends one."""
        name = lambda index: f"{tokenizer.convert_ids_to_tokens(index)!r} ({index})"
        others = ", ".join(name(index) for index in self.stop if index != self.taught)
        return f"responses end with {name(self.taught)}" + (f", written ones also with {others}" if others else "")


def end_ids(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> EndIds:
    """The decision for the model in `folder`.

    Raises:
        UserError: a file is damaged, or its eos_token_id is no id; or no file and no eos_token names an end.
    """
    known = set(tokenizer.get_vocab().values())
    named = (ids_in(Path(folder) / name) for name in FILES)
    stop = next((ids for ids in named if known.intersection(ids)), None) or (tokenizer.eos_token_id,)
    if stop == (None,):
        raise UserError(f"{folder}: the tokenizer names no eos_token; name one in tokenizer_config.json")
    taught = tokenizer.eos_token_id if tokenizer.eos_token_id in stop else next(index for index in stop if index in known)
    return EndIds(stop, taught)


def ids_in(file: Path) -> tuple[int, ...]:
    """eos_token_id of one file; none where it names none, or is not there."""
    fields = read_json(file) if file.is_file() else {}
    if not isinstance(fields, dict):
        raise UserError(f"{file}: holds no JSON object; copy or download it again")
    value = fields.get(FIELD)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int for index in ids):
        raise UserError(f"{file}: {FIELD} is {json.dumps(value)}; write the id of a token, or a list of ids")
    return tuple(dict.fromkeys(ids))


def write_end_ids(folder: Path, ends: EndIds) -> None:
    """Where `generate` on `folder` would end elsewhere, the file that it reads is told; otherwise no byte changes."""
    file = next(folder / name for name in FILES if (folder / name).is_file())
    if set(ids_in(file)) != set(ends.stop):
        value = ends.stop[0] if len(ends.stop) == 1 else list(ends.stop)
        file.write_text(json.dumps(read_json(file) | {FIELD: value}, indent=2) + "\n", encoding="utf-8")
