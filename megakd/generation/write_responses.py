"""Responses to a file of prompts, into a file that training reads as it is: SeqKD's data, and whatever else wants answers.

Rows keep their fields and their order; an answer that was there, be it a chat's last turn, becomes `reference`. Rows are written
chunk by chunk, and the same command continues after the last whole chunk: the chunks, and so the bytes, are those of an unbroken run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from megakd.config import GenerateConfig, ResponseConfig, flag_name, from_yaml
from megakd.data.end_ids import EndIds
from megakd.data.forms import unanswered
from megakd.data.prompt_dataset import PromptDataset
from megakd.data.text_dataset import response_text
from megakd.errors import UserError, file_errors, read_json, tell
from megakd.generation.answers import Writer, hidden_ids, open_folders, sampling_of
from megakd.generation.origin import checksums
from megakd.generation.progress import Progress
from megakd.loading import frozen, start
from megakd.reporting.jsonl import dump
from megakd.reporting.own_folder import MARKER, check_can_write, hidden, mark, marked_by, write_text
from megakd.runtime.initialize import is_rank_zero

MAY_CHANGE = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "batch_size", "save")  # when a file is continued


def write_responses(config: GenerateConfig) -> None:
    """All responses to `config.data` into `config.save`.

    Raises:
        UserError: something does not fit; before any weight is loaded where that can be known.
    """
    config.check()
    folders = open_folders(config)
    tokenizer, ends = folders.student.tokenizer, folders.student.ends
    prompts = Prompts(config.data, tokenizer, ends, config.responses)
    file = ResponseFile(config)
    (model,) = folders.load(start(config.parallel), config.dtype)
    writer = Writer.of(folders.student, frozen(model), config.responses.batch_size)
    done = file.continue_at(writer.chunk_size, len(prompts))
    progress, hiding = Progress(len(prompts) - done), 0
    for chunk in writer.answer(list(prompts)[done:], sampling_of(config.responses, config.seed)):
        answered = range(done, done + len(chunk))
        file.append(prompts.row(i, tokens, token_ids=config.token_ids) for i, tokens in zip(answered, chunk))
        done += len(chunk)
        hiding += sum(map(prompts.hides, chunk))
        progress.advance(len(chunk), config.save)
    if hiding and not config.token_ids:
        tell(f"{config.save}: {hiding} responses hold special tokens that their text lacks, and so would training; --token-ids keeps them")
    if is_rank_zero():
        print(f"{config.save}: {len(prompts)} rows")


class Prompts(PromptDataset):
    """The prompts of a data file, with the fields of their rows."""

    def __init__(self, path: str, tokenizer: PreTrainedTokenizerBase, ends: EndIds, settings: ResponseConfig) -> None:
        length, template = settings.max_prompt_length, settings.prompt_template
        super().__init__(path, tokenizer, max_prompt_length=length, template=template, prompts_only=True)
        self.ends, self.hidden = ends, hidden_ids(tokenizer)

    def hides(self, response: Sequence[int]) -> bool:
        """Whether the text of a response does not show all of it."""
        return not self.hidden.isdisjoint(self.ends.without_end(response))

    def row(self, index: int, response: Sequence[int], *, token_ids: bool) -> dict[str, Any]:
        """What is written for one prompt: training reads it as this prompt and this response, and no other."""
        prompt = self[index].prompt
        fields = unanswered(self.fields(index))
        said = self.ends.without_end(response)
        ids = {"prompt_ids": prompt, "response_ids": response} if token_ids else {}
        text = response_text(self.tokenizer, prompt, said)
        return {**fields, "response": text, "finish_reason": "stop" if len(said) < len(response) else "length", **ids}


class ResponseFile:
    """The jsonl file of a command, and beside it the settings that made it, `<file>.config.yaml`, and what from, `<file>.megakd.json`.

    Raises:
        UserError: the file there is not ours, or was begun with other data, another model or other settings; or cannot be written.
    """

    def __init__(self, config: GenerateConfig) -> None:
        self.path, self.config = Path(config.save), config
        if self.path.is_dir():
            raise UserError(f"--save {self.path} is a folder; name a jsonl file, as {self.path / 'answers.jsonl'}")
        check_can_write(self.path.parent, flag="--save")
        self.settings, self.marker = (self.path.with_name(f"{self.path.name}.{name}") for name in ("config.yaml", MARKER))
        self.origin = checksums(config)
        if self.path.is_file():
            self._check_settings(self._same_origin())
        with file_errors(self.path, flag="--save"):
            self._lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []

    def _same_origin(self) -> set[str]:
        """The settings whose files are known to be those that the answers were begun with, whatever they are called now."""
        if not self.settings.is_file():
            raise UserError(f"--save {self.path} exists, and no {self.settings.name} says how it was made; name another file")
        if marked_by(self.marker) is None:
            tell(f"{self.path} was begun by a version without checksums: that its data and model are still the same is not checked")
            return set()
        before = read_json(self.marker).get("sha256", {})
        for name, checksum in self.origin.items():
            if name in before and before[name] != checksum:
                value = getattr(self.config, name, self.config.responses.prompt_template)
                raise UserError(
                    f"{flag_name(name)} {value}: its content is not what --save {self.path} was begun with; "
                    "give it as it was to continue, or another --save to start anew"
                )
        return before.keys() & self.origin.keys()

    def _check_settings(self, same: set[str]) -> None:
        before, now = from_yaml(self.settings, GenerateConfig).flat(), self.config.flat()
        for name, value in now.items():
            if name not in {*MAY_CHANGE, *same} and before[name] != value:
                raise UserError(
                    f"{flag_name(name)} {value} differs from the {before[name]} that --save {self.path} was begun with; "
                    "give the same command to continue it, or another --save to start anew"
                )

    def continue_at(self, chunk_size: int, rows: int) -> int:
        """Rows that stay: whole chunks, or the whole file where it is complete. On rank 0 what follows them is cut off."""
        whole = sum(line.endswith(b"\n") for line in self._lines)
        kept = rows if whole >= rows else whole // chunk_size * chunk_size
        if is_rank_zero():
            with file_errors(self.path, flag="--save"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self.settings, yaml.safe_dump(self.config.flat(), sort_keys=False))
                mark(self.marker, "generate.py", sha256=self.origin)
                hidden(self.path).write_bytes(b"".join(self._lines[:kept]))
                os.replace(hidden(self.path), self.path)
        self._lines = []
        return kept

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """One chunk, on rank 0."""
        if is_rank_zero():
            with file_errors(self.path, flag="--save"), self.path.open("a", encoding="utf-8") as file:
                file.writelines(dump(row) for row in rows)
