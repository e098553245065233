"""Rouge-L and exact match of one answer; a set's score is the mean over its answers.

    rouge_l       the best Rouge-L F-measure over the references, times 100; with the default tokenizer that of the papers
    exact_match   100 where the answer equals a reference, else 0
        strict    but for case, spacing and a last full stop
        papers    after lower-casing, without punctuation, spaces joined, as MiniLLM and PromptKD score it: 3.5 is 35, < is >

The papers' tokenizer of Rouge-L sees a to z and 0 to 9 alone: identical answers in Chinese, Russian or Arabic score 0. `unicode`
sees words of every script; on text without other letters than those, both are the same.
"""

import string
import unicodedata
from collections.abc import Sequence
from functools import cache

import regex
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"  # scripts that write words without spaces between them
WORD = regex.compile(rf"[{UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]+|\S", regex.VERSION1)

STEMMED = DefaultTokenizer(use_stemmer=True)  # the papers'


class UnicodeTokenizer(Tokenizer):
    """Runs of letters, marks and digits, and single characters of unspaced scripts; signs where a text holds nothing else."""

    def tokenize(self, text: str) -> list[str]:
        """English words are stemmed as by default."""
        found = WORD.findall(unicodedata.normalize("NFC", text).casefold())
        words = [part for part in found if part[0].isalnum()]
        return [stem for word in words or found for stem in (STEMMED.tokenize(word) if word.isascii() and words else [word])]


UNICODE = UnicodeTokenizer()


def rouge_tokenizer(kind: str, model_tokenizer: Tokenizer) -> Tokenizer:
    """Of --rouge-tokenizer: `model` cuts text into the model's tokens."""
    return {"default": STEMMED, "unicode": UNICODE, "model": model_tokenizer}[kind]


def rouge_l(prediction: str, references: Sequence[str], tokenizer: Tokenizer = STEMMED) -> float:
    """One sample's best, 0 to 100."""
    return 100 * max(scorer(tokenizer).score(reference, prediction)["rougeL"].fmeasure for reference in references)


@cache
def scorer(tokenizer: Tokenizer) -> RougeScorer:
    """Made once, when the first answer is scored."""
    return RougeScorer(["rougeL"], tokenizer=tokenizer)  # rougeL, not rougeLsum: the text is one sequence, newlines and all


def is_unseen(references: Sequence[str], tokenizer: Tokenizer) -> bool:
    """Whether Rouge-L is 0 whatever the answer, for a tokenizer that finds no word in any of the right ones."""
    return any(map(str.strip, references)) and not any(map(tokenizer.tokenize, references))


def unseen_letters(texts: Sequence[str], tokenizer: Tokenizer) -> float:
    """Share of letters and digits that the tokenizer drops: the default one all but those of ASCII."""
    letters = [letter for text in texts for letter in text if letter.isalnum()]
    return sum(not letter.isascii() for letter in letters) / max(1, len(letters)) if tokenizer is STEMMED else 0.0


def exact_match(prediction: str, references: Sequence[str], rule: str = "strict") -> float:
    """One sample's best, 0 or 100."""
    normalize = {"strict": same_writing, "papers": without_punctuation}[rule]
    return 100.0 * any(normalize(prediction) == normalize(reference) for reference in references)


def same_writing(text: str) -> str:
    """Case folded, single spaces, without a last full stop: signs are part of an answer."""
    words = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return words[:-1] if words.endswith((".", "\u3002")) else words


def without_punctuation(text: str) -> str:
    """Lower case, no punctuation, single spaces. Articles stay."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
