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


class PromptDataset(TextDataset):
    """The rows of `path` that have a prompt of at most `max_prompt_length` ids, each a Sample with an empty response.

    Raises ValueError where the file cannot be used or no row is left.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int = 256) -> None:
        super().__init__()
        rows = [row if row.prompt else opening(row, tokenizer, max_prompt_length) for row in read_rows(path)]
        prompts = encode(tokenizer, [row.prompt for row in rows])
        report_dropped(path, prompts, max_prompt_length)
        for row, prompt in zip(rows, prompts):
            if not prompt:
                raise ValueError(f"{row.where} has an empty prompt; a model needs at least one token to continue")
            if len(prompt) <= max_prompt_length:
                self._add(row, prompt, [])


def opening(row: Row, tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> Row:
    """The row of a plain text as a prompt and its continuation."""
    (ids,) = encode(tokenizer, [row.references[0] if row.references else ""])
    end = min(max_prompt_length, len(ids) // 2)
    return replace(row, prompt=tokenizer.decode(ids[:end]), references=(tokenizer.decode(ids[end:]),))
