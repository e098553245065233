"""Prompts with their responses.

EOS follows the response; a row of more than `max_length` ids loses its tail, and EOS with it. Plain text has no prompt, and every
token is learnt: a document is cut into pieces of `max_length` ids; or, with `full_rows`, all documents are one stream that is cut
into pieces of exactly that length, the remainder left out (MiniLLM's language-modelling text).
"""

from array import array
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.data.conditioning import Conditioning
from megakd.data.forms import Row
from megakd.data.rows import Rows
from megakd.data.text_dataset import CHECKED_ROWS, TextDataset, encode_responses, report_dropped, tell_if_misspelled
from megakd.data.tokenizer import encode
from megakd.errors import UserError

NO_RESPONSE = "training needs a field response or output"


class SFTDataset(TextDataset):
    """The rows of `path` that have a prompt of at most `max_prompt_length` ids, each a Sample of at most `max_length`.

    Raises UserError where the file cannot be used, a row has no response (`no_response` is what is said of it), or no row is left.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        max_prompt_length: int = 256,
        template: str = "alpaca",
        conditioning: Conditioning | None = None,
        full_rows: bool = False,
        no_response: str = NO_RESPONSE,
    ) -> None:
        super().__init__(Rows(path, tokenizer, template=template, conditioning=conditioning))
        if max_prompt_length >= max_length:
            raise UserError(
                f"--max-prompt-length {max_prompt_length} leaves no room for a response in --max-length {max_length}; lower it"
            )
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self._stream: list[int] | None = [] if full_rows else None  # of documents, what does not fill a row yet
        lengths = array("q")
        for rows in self._rows.read_in_parts():
            check_responses(rows, no_response)
            prompts = encode(tokenizer, [row.prompt for row in rows])
            responses = encode_responses(rows, prompts, tokenizer)
            if not lengths:
                check_spelling(rows, prompts, responses, tokenizer)
            first = len(lengths)
            lengths.extend(map(len, prompts))
            kept = [i for i, prompt in enumerate(prompts) if len(prompt) <= max_prompt_length]
            learnt = [responses[i][: max_length - len(prompts[i])] if prompts[i] else responses[i] for i in kept]
            primed = self._primed([rows[i] for i in kept], [prompts[i] for i in kept], learnt, tokenizer)
            for i, response, ids in zip(kept, learnt, primed):
                if ids is not None:
                    self._add_row(first + i, prompts[i], response, ids)
        report_dropped(path, lengths, max_prompt_length)
        self._report_primed()
        if not self:
            if full_rows:
                raise UserError(f"{path} holds less text than a row of --max-length {max_length} tokens; give more or lower it")
            raise UserError(f"{path} holds no text; its documents have no tokens to learn")

    def _add_row(self, number: int, prompt: list[int], response: list[int], primed: list[int]) -> None:
        """One sample; of plain text as many as it fills."""
        if self._stream is not None and not prompt:
            self._stream += response
            whole = len(self._stream) // self.max_length * self.max_length
            response, self._stream = self._stream[:whole], self._stream[whole:]
        for piece in [response] if prompt else pieces(response, self.max_length):
            self._add(number, prompt, piece, primed)


def pieces(text: list[int], max_length: int) -> list[list[int]]:
    """Plain text in as many pieces as it takes, of two ids or more: one alone has nothing to be predicted from."""
    every = [text[first : first + max_length] for first in range(0, len(text), max_length)]
    return [piece for piece in every if len(piece) > 1]


def check_spelling(
    rows: Sequence[Row], prompts: Sequence[list[int]], responses: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Tells of the first of the first rows whose ids are not its text; ids that a row brings along have been looked at."""
    first = [(row, prompt, ids[: len(ids) - row.ends]) for row, prompt, ids in zip(rows, prompts, responses) if not row.ids]
    checked = [(row.where, row.prompt + row.response, prompt + ids) for row, prompt, ids in first[:CHECKED_ROWS]]
    tell_if_misspelled(checked, tokenizer)


def check_responses(rows: Sequence[Row], no_response: str = NO_RESPONSE) -> None:
    """Raises UserError at the first row without one."""
    for row in rows:
        if row.response is None:
            raise UserError(f"{row.where} has no response; {no_response}")
