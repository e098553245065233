"""Prompts to be answered: for on-policy methods and for evaluation. Responses may be missing; those there are become references.

Plain text is made into a task of continuing it: the prompt is its first `max_prompt_length` ids, or its first half if that is
shorter, and the rest is the reference.
"""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.data.conditioning import Conditioning
from megakd.data.forms import Row
from megakd.data.rows import Rows
from megakd.data.text_dataset import CHECKED_ROWS, TextDataset, report_dropped, tell_if_misspelled
from megakd.data.tokenizer import encode
from megakd.errors import UserError


class PromptDataset(TextDataset):
    """The rows of `path` that have a prompt of at most `max_prompt_length` ids, each a Sample with an empty response.

    Raises UserError where the file cannot be used or no row is left; or, with `prompts_only`, at the first plain text.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int = 256,
        template: str = "alpaca",
        conditioning: Conditioning | None = None,
        prompts_only: bool = False,
    ) -> None:
        super().__init__(Rows(path, tokenizer, template=template, conditioning=conditioning))
        self.tokenizer, self.max_prompt_length, lengths = tokenizer, max_prompt_length, array("q")
        beginning = list(self._beginning())
        for rows in self._rows.read_in_parts():
            check_prompts(rows, prompts_only=prompts_only)
            whole = encode(tokenizer, [row.response if row.is_text else row.prompt for row in rows])
            if not lengths:
                checked = [(row.where, row.prompt, ids) for row, ids in zip(rows, whole) if not row.is_text]
                tell_if_misspelled(checked[:CHECKED_ROWS], tokenizer)
            asked = [self._opening(row, ids) for row, ids in zip(rows, whole)]
            kept = [i for i, (_, ids) in enumerate(asked) if 0 < len(ids) <= max_prompt_length]
            responses = self._responses([asked[i] for i in kept])
            primed = self._primed(*zip(*(asked[i] for i in kept)), responses, tokenizer) if kept else []
            for i, response, ids in zip(kept, responses, primed):
                if ids is not None:
                    self._add(len(lengths) + i, beginning + asked[i][1], response, beginning + ids if ids else ids)
            lengths.extend(len(ids) for _, ids in asked)
        report_dropped(path, lengths, max_prompt_length)
        self._report_primed()
        if not self:
            raise UserError(f"{path} holds no text of two tokens or more; there is nothing to continue")

    def text(self, index: int) -> Row:
        row = super().text(index)
        return self._opening(row, encode(self.tokenizer, [row.response])[0])[0] if row.is_text else row

    def _opening(self, row: Row, ids: list[int]) -> tuple[Row, list[int]]:
        """A plain text as a prompt and its continuation: the new row, and the ids of its prompt (none if the text has only one)."""
        if not row.is_text:
            return row, ids
        end = min(self.max_prompt_length, len(ids) // 2)
        rest = self.tokenizer.decode(ids[end:])
        return replace(row, prompt=self.tokenizer.decode(ids[:end]), references=(rest,), response=rest), ids[:end]

    def _responses(self, asked: Sequence[tuple[Row, list[int]]]) -> Sequence[Sequence[int]]:
        """What is kept as the samples' responses: nothing."""
        return [()] * len(asked)

    def _beginning(self) -> Sequence[int]:
        """What stands before every prompt: nothing."""
        return ()


def check_prompts(rows: list[Row], *, prompts_only: bool) -> None:
    """Raises UserError at the first row with neither a prompt nor a text; with `prompts_only`, at a text too."""
    for row in rows:
        if prompts_only and row.is_text:
            raise UserError(f"{row.where} is plain text; --data needs rows with prompt, or with instruction and input")
        if not row.prompt and not row.is_text:
            raise UserError(f"{row.where} has an empty prompt; a model needs at least one token to continue")
