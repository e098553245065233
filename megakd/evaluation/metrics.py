"""Rouge-L and exact match of one answer, as the MiniLLM and PromptKD papers score it; a set's score is the mean over its answers.

    rouge_l       the best Rouge-L F-measure over the references, Porter stemmer on, times 100
    exact_match   100 where the answer equals a reference after lower-casing, without punctuation, spaces joined, else 0
"""

import string
from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """One sample's best, 0 to 100."""
    return 100 * max(scorer().score(reference, prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """One sample's best, 0 or 100."""
    return 100.0 * any(normalize(prediction) == normalize(reference) for reference in references)


@cache
def scorer() -> RougeScorer:
    """Made once, when the first answer is scored."""
    return RougeScorer(["rougeL"], use_stemmer=True)  # rougeL, not rougeLsum: the text is one sequence, newlines and all


def normalize(text: str) -> str:
    """Lower case, no punctuation, single spaces. Articles stay."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
