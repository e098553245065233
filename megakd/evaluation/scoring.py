"""From response tokens to scores: what every command that scores answers does alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megakd.config import ScoreConfig
from megakd.data.batch import Sample
from megakd.data.text_dataset import response_text
from megakd.evaluation import metrics
from megakd.generation.answers import gather_by_index

Score = Callable[[int, str], dict[str, float]]  # of an index and its answer


def answer_texts(tokenizer: PreTrainedTokenizerBase, asked: Sequence[Sample], responses: Sequence[Sequence[int]]) -> list[str]:
    """What is scored of responses, whose ends are off already."""
    return [response_text(tokenizer, sample.prompt, tokens).strip() for sample, tokens in zip(asked, responses)]


def scores_of(answer: str, references: Sequence[str], rules: ScoreConfig, tokenizer: metrics.Tokenizer) -> dict[str, float]:
    """Each metric of one answer to any question, 0 to 100; `tokenizer` is Rouge-L's."""
    return {
        "rouge_l": metrics.rouge_l(answer, references, tokenizer),
        "exact_match": metrics.exact_match(answer, references, rules.exact_match_rule),
    }


def score_together(score: Score, answers: Sequence[str], group: dist.ProcessGroup) -> list[dict[str, float]]:
    """Scores of each answer, on every rank of the group. Rouge-L is plain Python, so every rank scores some."""
    mine = {i: score(i, answers[i]) for i in range(group.rank(), len(answers), group.size())}
    gathered = gather_by_index(mine, group)
    return [gathered[i] for i in range(len(answers))]
