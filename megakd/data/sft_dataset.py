"""Prompts with their responses.

EOS follows the response; a row of more than `max_length` ids loses its tail, and EOS with it. Plain text has no prompt, and every
token is learnt: a document is cut into pieces of `max_length` ids; or, with `full_rows`, all documents are one stream that is cut
into pieces of exactly that length, the remainder left out (MiniLLM's language-modelling text).
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.data.rows import Row, read_rows
from megakd.data.text_dataset import TextDataset, encode_responses, report_dropped
from megakd.data.tokenizer import encode, eos_id
from megakd.errors import UserError


class SFTDataset(TextDataset):
    """The rows of `path` that have a prompt of at most `max_prompt_length` ids, each a Sample of at most `max_length`.

    Raises UserError where the file cannot be used, a row has no response, or no row is left.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 512,
        max_prompt_length: int = 256,
        template: str = "alpaca",
        full_rows: bool = False,
    ) -> None:
        super().__init__()
        if max_prompt_length >= max_length:
            raise UserError(
                f"--max-prompt-length {max_prompt_length} leaves no room for a response in --max-length {max_length}; lower it"
            )
        rows = read_rows(path, tokenizer, template=template)
        check_responses(rows)
        prompts = encode(tokenizer, [row.prompt for row in rows])
        report_dropped(path, [len(prompt) for prompt in prompts], max_prompt_length)
        responses = [[*response, eos_id(tokenizer)] for response in encode_responses(rows, prompts, tokenizer)]
        if full_rows and not any(prompts):
            responses = [whole_pieces([i for response in responses for i in response], max_length)]
        for row, prompt, response in zip(rows, prompts, responses):
            if len(prompt) <= max_prompt_length:
                for piece in cut(prompt, response, max_length):
                    self._add(row, prompt, piece)
        if not self:
            if full_rows:
                raise UserError(f"{path} holds less text than a row of --max-length {max_length} tokens; give more or lower it")
            raise UserError(f"{path} holds no text; its documents have no tokens to learn")


def cut(prompt: list[int], response: list[int], max_length: int) -> list[list[int]]:
    """The response cut to `max_length` ids with its prompt; plain text in as many pieces as it takes, of two ids or more."""
    if prompt:
        return [response[: max_length - len(prompt)]]
    pieces = [response[first : first + max_length] for first in range(0, len(response), max_length)]
    return [piece for piece in pieces if len(piece) > 1]  # one id alone has nothing to be predicted from


def whole_pieces(stream: list[int], length: int) -> list[int]:
    """As much of the stream as fills pieces of `length`."""
    return stream[: len(stream) // length * length]


def check_responses(rows: list[Row]) -> None:
    """Raises UserError at the first row without one."""
    for row in rows:
        if not row.references:
            raise UserError(f"{row.where} has no response; training needs a field response or output")
