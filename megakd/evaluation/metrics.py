"""Rouge-L and exact match, as the MiniLLM and PromptKD papers score answers.

    rouge_l       mean over samples of max over references of Rouge-L's F-measure, Porter stemmer on, times 100
    exact_match   percentage of samples whose answer equals a reference after lower-casing, without punctuation, spaces joined
"""

import string
from collections.abc import Callable, Sequence

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """0 to 100. `references[i]` are the right answers to sample i. Raises ValueError on unequal or empty lists."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)  # rougeL, not rougeLsum: the text is one sequence, newlines and all
    return mean_of_best(lambda prediction, target: scorer.score(target, prediction)["rougeL"].fmeasure, predictions, references)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """0 to 100. `references[i]` are the right answers to sample i. Raises ValueError on unequal or empty lists."""
    return mean_of_best(lambda prediction, target: float(normalize(prediction) == normalize(target)), predictions, references)


def normalize(text: str) -> str:
    """Lower case, no punctuation, single spaces. Articles stay."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def mean_of_best(
    score: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """100 × the mean over samples of the best score over that sample's references."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} samples; give one prediction a sample")
    if not predictions:
        raise ValueError("no predictions to score; the data hold no sample")
    best = []
    for number, (prediction, targets) in enumerate(zip(predictions, references)):
        if isinstance(targets, str) or not targets:
            raise ValueError(f"sample {number}: references are {targets!r}; give a list of one or more texts")
        best.append(max(score(prediction, target) for target in targets))
    return 100 * sum(best) / len(best)
