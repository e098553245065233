"""A named file of prompts with right answers: what is asked, what is scored against, and the gold responses for the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.config import EvaluateConfig, ScoreConfig
from megakd.data.batch import Sample
from megakd.data.conditioning import Conditioning
from megakd.data.forms import Row
from megakd.data.prompt_dataset import PromptDataset
from megakd.data.sft_dataset import check_responses
from megakd.data.text_dataset import encode_responses
from megakd.errors import UserError
from megakd.evaluation import gsm8k, metrics
from megakd.evaluation.scoring import scores_of

USUAL_RULES = ScoreConfig()


class EvaluationSet(PromptDataset):
    """The rows of `path` that have a prompt of at most `max_prompt_length` ids.

    A Sample's response is the first right answer and EOS, `max_response_length` ids at most. `add_bos` puts in front what the
    tokenizer puts in front of a text (OPT's </s>, Llama's <s>, nothing for GPT-2).

    Raises UserError where the file cannot be used, or a row has no right answer.
    """

    def __init__(
        self,
        name: str,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_prompt_length: int,
        max_response_length: int,
        add_bos: bool = False,
        template: str = "alpaca",
        conditioning: Conditioning | None = None,
        scores: ScoreConfig = USUAL_RULES,
    ) -> None:
        self.name, self.path, self.max_response_length = name, str(path), max_response_length
        self.rules, self.rouge_tokenizer = scores, metrics.rouge_tokenizer(scores.rouge_tokenizer_of(name), tokenizer)
        self._bos = tokenizer("")["input_ids"] if add_bos else []
        super().__init__(path, tokenizer, max_prompt_length=max_prompt_length, template=template, conditioning=conditioning)

    def _beginning(self) -> Sequence[int]:
        return self._bos

    def _responses(self, asked: Sequence[tuple[Row, list[int]]]) -> Sequence[Sequence[int]]:
        rows, prompts = [row for row, _ in asked], [ids for _, ids in asked]
        check_responses(rows)
        return [gold[: self.max_response_length] for gold in encode_responses(rows, prompts, self.tokenizer)]

    def questions(self) -> list[Sample]:
        """The samples without their responses."""
        return [replace(sample, response=()) for sample in self]

    def teacher_questions(self) -> list[Sample]:
        """The same as the teacher reads them."""
        return [sample.for_teacher for sample in self.questions()]

    def score(self, index: int, answer: str) -> dict[str, float]:
        """Each metric of one answer, 0 to 100."""
        return scores_of(answer, self.references(index), self.rules, self.rouge_tokenizer)

    def unseen(self) -> dict[str, float]:
        """What Rouge-L does not see of the right answers: rows without any word of its, and the share of letters in per cent."""
        every = [self.references(i) for i in range(len(self))]
        rows = sum(metrics.is_unseen(references, self.rouge_tokenizer) for references in every)
        letters = metrics.unseen_letters([text for references in every for text in references], self.rouge_tokenizer)
        return {"rouge_l_unseen_rows": rows, "rouge_l_unseen_letters": 100 * letters}


class GSM8KSet(EvaluationSet):
    """GSM8K: also whether the number is right."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.gold: list[Fraction] = [gsm8k.gold_number(self.references(i)[0], self.where(i)) for i in range(len(self))]

    def score(self, index: int, answer: str) -> dict[str, float]:
        return super().score(index, answer) | gsm8k.score(answer, self.gold[index], self.rules.gsm8k_rule)


@dataclass(frozen=True)
class NamedPath:
    """One word of --data, say."""

    name: str
    path: str

    @classmethod
    def read(cls, word: str) -> NamedPath:
        """`name=path`, or a path alone, which is named after its file."""
        name, equals, path = word.partition("=")
        return cls(name, path) if equals and not Path(word).exists() else cls(Path(word).stem, word)


def named_paths(words: Sequence[str], *, flag: str = "--data") -> list[NamedPath]:
    """The words of a flag that takes `name=path` or path.

    Raises:
        UserError: two have one name.
    """
    named = [NamedPath.read(word) for word in words]
    for i, one in enumerate(named):
        for other in named[:i]:
            if one.name == other.name:
                raise UserError(f"{flag} {other.path} {one.path}: both are named {one.name}; name one, as in first={other.path}")
    return named


def open_sets(
    config: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, conditioning: Conditioning | None = None
) -> list[EvaluationSet]:
    """Every set of a run, read and checked."""
    lengths = {"max_prompt_length": config.responses.max_prompt_length, "max_response_length": config.responses.max_new_tokens}
    kinds = [(EvaluationSet, named) for named in named_paths(config.data)]
    kinds += [(GSM8KSet, NamedPath("gsm8k", config.gsm8k))] if config.gsm8k else []
    names = {"", *(named.name for _, named in kinds)}
    if unknown := sorted(config.scores.rouge_tokenizers.keys() - names):
        raise UserError(f"--rouge-tokenizer {unknown[0]}=...: no data set has this name; there are {', '.join(sorted(names - {''}))}")
    options = {"add_bos": config.add_bos, "template": config.responses.prompt_template, "scores": config.scores, **lengths}
    options["conditioning"] = conditioning
    return [kind(named.name, named.path, tokenizer, **options) for kind, named in kinds]
