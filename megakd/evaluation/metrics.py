"""Rouge-L and exact match, as the MiniLLM and PromptKD papers score answers.

    rouge_l       mean over samples of max over references of Rouge-L's F-measure, Porter stemmer on, times 100
    exact_match   percentage of samples whose answer equals a reference after lower-casing, without punctuation, spaces joined
"""

import string
from collections.abc import Callable, Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """0 to 100. `references[i]` are the right answers to sample i. Raises ValueError on unequal or empty lists."""
    return mean_of_best(sample_rouge_l, predictions, references)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """0 to 100. `references[i]` are the right answers to sample i. Raises ValueError on unequal or empty lists."""
    return mean_of_best(sample_exact_match, predictions, references)


def sample_rouge_l(prediction: str, references: Sequence[str]) -> float:
    """One sample's best, 0 to 100."""
    return 100 * max(scorer().score(reference, prediction)["rougeL"].fmeasure for reference in references)


def sample_exact_match(prediction: str, references: Sequence[str]) -> float:
    """One sample's best, 0 or 100."""
    return 100.0 * any(normalize(prediction) == normalize(reference) for reference in references)


@cache
def scorer() -> RougeScorer:
    """Made once, when the first answer is scored."""
    return RougeScorer(["rougeL"], use_stemmer=True)  # rougeL, not rougeLsum: the text is one sequence, newlines and all


def normalize(text: str) -> str:
    """Lower case, no punctuation, single spaces. Articles stay."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def mean_of_best(
    best: Callable[[str, Sequence[str]], float], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> float:
    """The mean over samples of the best score over that sample's references."""
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} samples; give one prediction a sample")
    if not predictions:
        raise ValueError("no predictions to score; the data hold no sample")
    for number, targets in enumerate(references):
        if isinstance(targets, str) or not targets:
            raise ValueError(f"sample {number}: references are {targets!r}; give a list of one or more texts")
    return sum(map(best, predictions, references)) / len(predictions)
