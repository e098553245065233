"""What the data sets share: rows of text beside their token ids, and the rules by which text becomes ids.

Prompt and response are encoded together, as one text, and cut at the prompt's length: this is how the published data were made.
Where the two merge into one token across the border, that row's prompt and response are encoded apart.

Ids are kept packed, 4 bytes each; texts are made of the file's records when they are asked for.
"""

from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from megakd.data.batch import Sample
from megakd.data.forms import Row
from megakd.data.packed import Packed
from megakd.data.rows import Rows
from megakd.data.tokenizer import encode, eos_id
from megakd.data.values import excerpt, first_difference
from megakd.errors import UserError, tell

CHECKED_ROWS = 16  # the first of a data set, whose ids are looked at as text


class TextDataset(Sequence[Sample]):
    """Samples in the order of the file; sample_id is the index."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._row_of = array("q")  # the row of each sample
        self._ids = Packed()  # prompt, response and the teacher's prompt of each, int32; the last empty where it is the first
        self._teacher_lengths = array("q")  # of the rows' teacher prompts, those left out among them

    def _add(self, row: int, prompt: Sequence[int], response: Sequence[int], primed: Sequence[int] = ()) -> None:
        self._row_of.append(row)
        for ids in (prompt, response, primed):
            self._ids.append(array("i", ids).tobytes())

    def _primed(
        self, rows: Sequence[Row], prompts: Sequence[list[int]], responses: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
    ) -> list[list[int] | None]:
        """Ids of what the teacher reads before each response, none where that is the prompt; None in place of them: the row is left out.

        Raises UserError where the teacher has no positions for a row.
        """
        conditioning, found = self._rows.conditioning, [[] for _ in rows]
        conditioned = [i for i, row in enumerate(rows) if row.teacher_prompt is not None]
        for i, ids in zip(conditioned, encode(tokenizer, [rows[i].teacher_prompt for i in conditioned])):
            self._teacher_lengths.append(len(ids))
            fits = conditioning.fits(ids, responses[i], rows[i].where)
            found[i] = None if not fits else [] if ids == prompts[i] else ids
        return found

    def _report_primed(self) -> None:
        """Tells of the rows that were left out for the teacher's sake. Raises UserError where that is all of them."""
        limit = self._rows.conditioning and self._rows.conditioning.settings.teacher_max_prompt_length
        if self._teacher_lengths and limit:
            report_dropped(self._rows.path, self._teacher_lengths, limit, flag="--teacher-max-prompt-length", whose="teacher prompt")

    def __len__(self) -> int:
        return len(self._row_of)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        prompt, response, primed = (tuple(array("i", self._ids[3 * index + part])) for part in (0, 1, 2))
        return Sample(index, prompt, response, primed or None)

    def text(self, index: int) -> Row:
        """The text of a sample."""
        return self._rows[self._row_of[index]]

    def references(self, index: int) -> tuple[str, ...]:
        """Every right response; the first is the one learnt. Empty in a file of prompts alone."""
        return self.text(index).references

    def where(self, index: int) -> str:
        """File and line of the row, as in messages."""
        return self._rows.where(self._row_of[index])

    def fields(self, index: int) -> dict:
        """All that the record of a sample holds."""
        return self._rows.fields(self._row_of[index])

    def prompt_text(self, index: int) -> str:
        """The rendered prompt, as the model is asked to continue it."""
        return self.text(index).prompt


def encode_responses(rows: Sequence[Row], prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of each row's response, as they follow the ids of its prompt, with EOS where the row ends.

    Raises:
        UserError: ids that a row brings along do not fit its text.
    """
    whole = encode(tokenizer, [row.prompt + row.response for row in rows])
    responses = [ids[len(prompt) :] for prompt, ids in zip(prompts, whole)]
    merged = [i for i, (prompt, ids) in enumerate(zip(prompts, whole)) if ids[: len(prompt)] != prompt]
    for i, apart in zip(merged, encode(tokenizer, [rows[i].response for i in merged])):
        responses[i] = apart
    ended = [[*response, eos_id(tokenizer)] if row.ends else response for row, response in zip(rows, responses)]
    return [given_ids(row, prompt, tokenizer) if row.ids else ids for row, prompt, ids in zip(rows, prompts, ended)]


def given_ids(row: Row, prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The response's ids that stand in the row: they may spell it otherwise than the tokenizer would, but not another text."""
    prompt_ids, response_ids = row.ids
    way_out = "take prompt_ids and response_ids out, and the text is learnt"
    if prompt_ids != prompt:
        raise UserError(f"{row.where}: prompt_ids are not those of its prompt with this tokenizer and --prompt-template; {way_out}")
    spelled = [response_text(tokenizer, prompt, ids) for ids in (response_ids, response_ids[:-1])]  # its end may be any token
    if max(response_ids, default=0) >= len(tokenizer) or row.response not in spelled:
        raise UserError(f"{row.where}: response_ids do not spell its response with this tokenizer; {way_out}")
    return response_ids


def response_text(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], response: Sequence[int]) -> str:
    """What the response adds to the prompt's text: decoded alone, Llama's tokenizers would lose its first space."""
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decode([*prompt, *response])[len(decode(list(prompt))) :]


def tell_if_misspelled(texts: Sequence[tuple[str, str, list[int]]], tokenizer: PreTrainedTokenizerBase) -> None:
    """One line about the first place whose ids are not its text: characters that the tokenizer lacks, or a space of its own making.

    `texts` are places, texts and ids. Spaces that the tokenizer puts into any text, as after <s>, are its own affair.
    """
    for where, text, ids in texts:
        said = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if said != text and not (without_spaces(said) == without_spaces(text) and ids == encode(tokenizer, [text])[0]):
            at = first_difference(said, text)
            tell(f"{where}: from character {at + 1} the text has {excerpt(text, at)}, and its token ids say {excerpt(said, at)}")
            return


def without_spaces(text: str) -> str:
    """All else."""
    return text.replace(" ", "")


def report_dropped(
    path: str | Path, lengths: Sequence[int], limit: int, *, flag: str = "--max-prompt-length", whose: str = "prompt"
) -> None:
    """Tells of the number of prompts that are too long. Raises UserError where that is all of them."""
    lengths = np.asarray(lengths)
    dropped = int((lengths > limit).sum())
    if dropped == len(lengths):
        raise UserError(
            f"{path}: all {dropped} {whose}s are longer than {flag} {limit} tokens; the shortest has {lengths.min()}: raise the flag"
        )
    if dropped:
        tell(f"{path}: left out {dropped} of {len(lengths)} rows, {whose} longer than {limit} tokens")
