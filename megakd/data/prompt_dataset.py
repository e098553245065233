"""Prompts to be answered: for on-policy methods and for evaluation. Responses may be missing; those there are become references.

Plain text is made into a task of continuing it: the prompt is its first `max_prompt_length` ids, or its first half if that is
shorter, and the rest is the reference.
"""

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.data.rows import Row, read_rows
from megakd.data.text_dataset import TextDataset, report_dropped
from megakd.data.tokenizer import encode
from megakd.errors import UserError


class PromptDataset(TextDataset):
    """The rows of `path` that have a prompt of at most `max_prompt_length` ids, each a Sample with an empty response.

    Raises UserError where the file cannot be used or no row is left.
    """

    def __init__(
        self, path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int = 256, template: str = "alpaca"
    ) -> None:
        super().__init__()
        rows = read_rows(path, tokenizer, template=template)
        check_prompts(rows)
        whole = encode(tokenizer, [row.prompt or row.references[0] for row in rows])
        asked = [(row, ids) if row.prompt else opening(row, ids, tokenizer, max_prompt_length) for row, ids in zip(rows, whole)]
        report_dropped(path, [len(ids) for _, ids in asked], max_prompt_length)
        for row, ids in asked:
            if 0 < len(ids) <= max_prompt_length:
                self._add(row, ids, [])
        if not self:
            raise UserError(f"{path} holds no text of two tokens or more; there is nothing to continue")


def check_prompts(rows: list[Row]) -> None:
    """Raises UserError at the first row with neither a prompt nor a text."""
    for row in rows:
        if not row.prompt and not row.references:
            raise UserError(f"{row.where} has an empty prompt; a model needs at least one token to continue")


def opening(row: Row, ids: list[int], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> tuple[Row, list[int]]:
    """A plain text as a prompt and its continuation: the new row, and the ids of its prompt (none if the text has only one)."""
    end = min(max_prompt_length, len(ids) // 2)
    return replace(row, prompt=tokenizer.decode(ids[:end]), references=(tokenizer.decode(ids[end:]),)), ids[:end]
