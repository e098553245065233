"""Rows of a run as text, to be looked at before it begins: what the student reads, what the teacher reads, and on which part the loss is.

The text is that of the token ids, special tokens among them: what is shown is what the models are given.
"""

from collections.abc import Sequence
from textwrap import indent

from transformers import PreTrainedTokenizerBase

from megakd.data.batch import Sample, unshifted_places

OPENS, CLOSES = "⟦", "⟧"


def as_read(sample: Sample, tokenizer: PreTrainedTokenizerBase, *, where: str, written: str, has_teacher: bool) -> str:
    """One row for each of its readers; `written` is said in place of a response that a model has yet to write."""
    shown = [f"{where}, the loss is on {OPENS}this{CLOSES}", *one_reader("the student", sample, tokenizer, written)]
    if has_teacher and sample.teacher_prompt is None:
        shown.append("the teacher reads the same")
    elif has_teacher:
        shown += one_reader("the teacher", sample.for_teacher, tokenizer, written)
    return "\n".join(shown)


def as_read_unshifted(sample: Sample, tokenizer: PreTrainedTokenizerBase, *, where: str, **_: object) -> str:
    """The same where each place of the prompts is compared with the response's token of that number."""
    places = unshifted_places(sample)
    shown = [f"{where}, the loss is on {OPENS}this{CLOSES}, place by place"]
    for name, ids in (("the student", sample.prompt), ("the teacher", sample.for_teacher.prompt)):
        shown += [f"{name} reads {places} tokens:", lines(f"{OPENS}{text(tokenizer, ids[:places])}{CLOSES}")]
    return "\n".join([*shown, f"their labels are {places} tokens:", lines(text(tokenizer, sample.response[:places]))])


def one_reader(name: str, sample: Sample, tokenizer: PreTrainedTokenizerBase, written: str) -> list[str]:
    """Who reads how many tokens, and which."""
    prompt, response = text(tokenizer, sample.prompt), written
    if sample.response:
        response = text(tokenizer, [*sample.prompt, *sample.response])[len(prompt) :]
    tokens = f"{len(sample.prompt)} + {len(sample.response)} tokens" if sample.response else f"{len(sample.prompt)} tokens"
    return [f"{name} reads {tokens}:", lines(f"{prompt}{OPENS}{response}{CLOSES}")]


def lines(text: str) -> str:
    """To be told from what is said about it."""
    return indent(text, "    | ", lambda line: True)


def text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """What the ids say."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
