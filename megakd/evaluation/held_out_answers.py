"""What the student answers to the prompts of --valid-data while it learns, scored as evaluate.py scores it.

    valid/rouge_l, valid/exact_match     means over the rows that have a prompt
    valid/gsm8k_...                      over those of them whose right answer ends in `#### 18`
    valid/response_length                tokens, the end not counted
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megakd.config import Config, ScoreConfig
from megakd.data.batch import Sample
from megakd.data.end_ids import EndIds
from megakd.data.routing import RoutedData
from megakd.data.text_dataset import TextDataset, response_text
from megakd.errors import UserError
from megakd.evaluation import gsm8k, metrics
from megakd.evaluation.scoring import answer_texts, score_together, scores_of
from megakd.generation.answers import Writer
from megakd.generation.sampling import Sampling
from megakd.models.gpt_model import HiddenStateGPTModel

LENGTH = "response_length"


class HeldOutAnswers:
    """Those of `samples` that ask something, out of `rows`, with their right answers."""

    def __init__(
        self, rows: Sequence[Sample], samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, rules: ScoreConfig, sampling: Sampling
    ) -> None:
        self.asked = [sample for sample in samples if sample.prompt]
        self.references = [right_answers(rows, sample, tokenizer) for sample in self.asked]
        self.golds = [gsm8k.find_gold(references[0]) for references in self.references]
        self.tokenizer, self.rules, self.sampling = tokenizer, rules, sampling
        self.rouge_tokenizer = metrics.rouge_tokenizer(rules.rouge_tokenizer_of("valid"), tokenizer)

    @classmethod
    def open(
        cls, config: Config, rows: Sequence[Sample], samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase
    ) -> HeldOutAnswers | None:
        """Of a run that scores them.

        Raises:
            UserError: there is nothing to be answered, or --keep-best names a score that these rows have not.
        """
        if not config.selection.eval_answers:
            return None
        greedy = config.selection.eval_decoding == "greedy"
        sampling = Sampling(max_new_tokens=config.max_new_tokens, greedy=greedy, seed=config.training.seed)
        answers, metric = cls(rows, samples, tokenizer, config.scores, sampling), config.selection.metric
        if not answers.asked:
            raise UserError(f"--eval-answers: no row of --valid-data {config.data.valid_data} has a prompt to be answered; leave it out")
        if "gsm8k" in metric and metric not in answers.names:
            raise UserError(
                f"--keep-best {metric}: --valid-data {config.data.valid_data} and --gsm8k-rule {config.scores.gsm8k_rule} give "
                f"{', '.join(answers.names)}; use one of these, or answers that end in `{gsm8k.GOLD} 18`"
            )
        return answers

    @property
    def names(self) -> list[str]:
        """Of the scores, as they are logged."""
        every = {name for i in range(len(self.asked)) for name in self.score(i, "")}
        return [f"valid/{name}" for name in sorted(every)]

    def score(self, index: int, answer: str) -> dict[str, float]:
        """Each metric of one answer, 0 to 100."""
        scores = scores_of(answer, self.references[index], self.rules, self.rouge_tokenizer)
        gold = self.golds[index]
        return scores if gold is None else scores | gsm8k.score(answer, gold, self.rules.gsm8k_rule)

    def scores(self, model: HiddenStateGPTModel, ends: EndIds, *, batch_size: int) -> dict[str, float]:
        """Means by name, on every rank of the model."""
        writer = Writer(model, ends, batch_size)
        responses = [response for chunk in writer.answer(self.asked, self.sampling) for response in chunk]
        said = [ends.without_end(response) for response in responses]
        rows = score_together(self.score, answer_texts(self.tokenizer, self.asked, said), model.layout.dp_group)
        rows = [row | {LENGTH: float(len(tokens))} for row, tokens in zip(rows, said)]
        names = dict.fromkeys(name for row in rows for name in row)
        return {f"valid/{name}": statistics.fmean(row[name] for row in rows if name in row) for name in names}


def right_answers(rows: Sequence[Sample], sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
    """The texts of its row; of token ids, which have none, what they spell."""
    rows = rows.rows if isinstance(rows, RoutedData) else rows
    if isinstance(rows, TextDataset):
        return rows.references(sample.sample_id)
    return [response_text(tokenizer, sample.prompt, sample.response).strip()]
