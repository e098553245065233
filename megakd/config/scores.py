"""By which rules answers are scored, and which student a run keeps by its scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megakd.config.fields import alias, flag

if TYPE_CHECKING:
    from megakd.config.train import Config

ROUGE_TOKENIZERS = ("default", "unicode", "model")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """By which rules answers are scored."""

    exact_match_rule: Literal["strict", "papers"] = flag(
        "strict", "strict: equal but for case, spacing and a last full stop; papers: without any punctuation, 3.5 is 35"
    )
    gsm8k_rule: Literal["robust", "papers", "both"] = flag(
        "robust", "robust: the number stated last, else the last number; papers: strict and flexible of Goyal et al. 2024; or both"
    )
    rouge_tokenizer: tuple[str, ...] = flag(
        ("default",), "of Rouge-L: default (the papers', a-z and digits alone), unicode (words of every script) or model; also set=unicode"
    )

    def rouge_tokenizer_of(self, name: str) -> str:
        """The one named for a data set, or for all."""
        return self.rouge_tokenizers.get(name, self.rouge_tokenizers.get("", "default"))

    @property
    def rouge_tokenizers(self) -> dict[str, str]:
        """By data set; under "" the one of all others."""
        return {name: kind for name, _, kind in (word.rpartition("=") for word in self.rouge_tokenizer)}

    def validation_errors(self) -> Iterator[str]:
        """What is no tokenizer."""
        for word, kind in zip(self.rouge_tokenizer, self.rouge_tokenizers.values()):
            if kind not in ROUGE_TOKENIZERS:
                yield f"--rouge-tokenizer {word}: use one of {', '.join(ROUGE_TOKENIZERS)}, for one data set as in name=unicode"


LOSSES = ("valid/lm_loss", "valid/reverse_kl")
ANSWER_SCORES = ("valid/rouge_l", "valid/exact_match", "valid/gsm8k_robust", "valid/gsm8k_strict", "valid/gsm8k_flexible")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """What is known of the student while it learns, and which one is kept."""

    eval_answers: Annotated[bool, alias("--eval-rouge", "--eval-gen")] = flag(
        False,
        "at every evaluation the student answers the prompts of --valid-data: Rouge-L, exact match, and where answers end in `#### 18` "
        "whether the number is right",
    )
    eval_decoding: Literal["greedy", "sample"] = flag(
        "greedy", "of --eval-answers; sample: at temperature 1 and with --seed, the same noise at every evaluation, as the papers do"
    )
    keep_best: str = flag(
        "", f"leave the student of the best evaluation in SAVE/best, by one of {', '.join(LOSSES + ANSWER_SCORES)}"
    )

    @property
    def metric(self) -> str:
        """Of --keep-best, with `valid/` before it or without; "" where nothing is kept."""
        return self.keep_best and f"valid/{self.keep_best.removeprefix('valid/')}"

    @property
    def lower_is_better(self) -> bool:
        """Of a loss."""
        return self.metric in LOSSES

    def validation_errors(self, config: Config) -> Iterator[str]:
        """What cannot be, one line each."""
        if not self.keep_best:
            return
        if self.metric not in LOSSES + ANSWER_SCORES:
            yield f"--keep-best {self.keep_best}: no evaluation has this number; use one of {', '.join(LOSSES + ANSWER_SCORES)}"
        if not config.data.valid_data:
            yield f"--keep-best {self.keep_best} is a number of --valid-data; give one, or leave it out"
        if self.metric in ANSWER_SCORES and not self.eval_answers:
            yield f"--keep-best {self.keep_best} is a score of answers; give --eval-answers, or use valid/lm_loss"
        if self.metric == "valid/reverse_kl" and not config.needs_teacher:
            yield f"--keep-best {self.keep_best} compares with a teacher, which --method {config.method} has not; use valid/lm_loss"

    def unless(self, config: Config) -> dict[str, tuple[Any, str]]:
        """Flags that are read under a condition."""
        rules = ("eval_decoding", *vars(config.scores))
        return {"eval_answers": (config.data.valid_data, "without --valid-data")} | dict.fromkeys(
            rules, (self.eval_answers, "without --eval-answers")
        )
