"""What the data sets share: rows of text beside their token ids, and the rules by which text becomes ids.

Prompt and response are encoded together, as one text, and cut at the prompt's length: this is how the published data were made.
Where the two merge into one token across the border, that row's prompt and response are encoded apart.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megakd.data.batch import Sample
from megakd.data.rows import Row
from megakd.data.tokenizer import encode
from megakd.errors import UserError

log = logging.getLogger(__name__)


class TextDataset(Sequence[Sample]):
    """Samples in the order of the file; sample_id is the index."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._prompts: list[np.ndarray] = []  # int32: as a tuple of Python ints an id takes nine times the memory
        self._responses: list[np.ndarray] = []

    def _add(self, row: Row, prompt: list[int], response: list[int]) -> None:
        self._rows.append(row)
        self._prompts.append(np.array(prompt, dtype=np.int32))
        self._responses.append(np.array(response, dtype=np.int32))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        return Sample(range(len(self))[index], tuple(self._prompts[index].tolist()), tuple(self._responses[index].tolist()))

    def references(self, index: int) -> tuple[str, ...]:
        """Every right response; the first is the one learnt. Empty in a file of prompts alone."""
        return self._rows[index].references

    def where(self, index: int) -> str:
        """File and line of the row, as in messages."""
        return self._rows[index].where

    def prompt_text(self, index: int) -> str:
        """The rendered prompt, as the model is asked to continue it."""
        return self._rows[index].prompt


def encode_responses(rows: list[Row], prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each row's first response, as they follow the ids of its prompt. No EOS."""
    whole = encode(tokenizer, [row.prompt + row.references[0] for row in rows])
    responses = [ids[len(prompt) :] for prompt, ids in zip(prompts, whole)]
    merged = [i for i, (prompt, ids) in enumerate(zip(prompts, whole)) if ids[: len(prompt)] != prompt]
    for i, apart in zip(merged, encode(tokenizer, [rows[i].references[0] for i in merged])):
        responses[i] = apart
    return responses


def report_dropped(path: str | Path, lengths: list[int], max_prompt_length: int) -> None:
    """Logs one line with the number of prompts that are too long, on rank 0. Raises UserError where that is all of them."""
    dropped = sum(length > max_prompt_length for length in lengths)
    if dropped == len(lengths):
        raise UserError(
            f"{path}: all {dropped} prompts are longer than --max-prompt-length {max_prompt_length} tokens; "
            f"the shortest has {min(lengths)}: raise the flag"
        )
    if dropped and os.environ.get("RANK", "0") == "0":  # data are opened before ranks join, so the launcher's word counts
        log.warning("%s: left out %d of %d rows, prompt longer than %d tokens", path, dropped, len(lengths), max_prompt_length)
