"""A small instruction data set of our own: ten kinds of task, each with one right answer, so that exact match means something.

    Sort: 7 2 9 4              Reverse: k f m b           Opposite: hot big near dry
    Answer: 2 4 7 9            Answer: b m f k            Answer: cold small far wet

Every word is one token and a task has nine; half of the prompts begin with a preamble such as "Suppose you are a student." and a
new line. A small model of relative (rotary) positions learns the tasks from nothing in a minute on a CPU. The preambles teach it
what a pretrained model knows: a task stays the same whatever stands in front of it, be it a text or a soft prompt.
"""

import random
import string
from collections.abc import Callable

LETTERS = string.ascii_lowercase
DIGITS = string.digits
PAIRS = (
    "hot cold, big small, fast slow, old young, high low, wet dry, hard soft, full empty, early late, light dark, "
    "rich poor, strong weak, open shut, long short, thick thin, loud quiet, sweet sour, near far, deep shallow, clean dirty"
)
OPPOSITES = dict(pair.split() for pair in PAIRS.split(", "))
OPPOSITES |= {right: left for left, right in OPPOSITES.items()}
PREAMBLES = (  # one prompt in two has none
    "Suppose you are a student.\n", "You are a good teacher.\n", "Here is a task.\n", "Please answer.\n", "", "", "", "",
)  # fmt: skip

Task = tuple[str, list[str], list[str]]  # instruction, items, answer


def copy(rng: random.Random) -> Task:
    """k f m b → k f m b"""
    letters = rng.choices(LETTERS, k=4)
    return "Copy", letters, letters


def reverse(rng: random.Random) -> Task:
    """k f m b → b m f k"""
    letters = rng.choices(LETTERS, k=4)
    return "Reverse", letters, letters[::-1]


def swap(rng: random.Random) -> Task:
    """k f m b → b f m k: first and last change places."""
    letters = rng.choices(LETTERS, k=4)
    return "Swap", letters, [letters[3], *letters[1:3], letters[0]]


def upper(rng: random.Random) -> Task:
    """k f m b → K F M B"""
    letters = rng.choices(LETTERS, k=4)
    return "Capitals", letters, [letter.upper() for letter in letters]


def next_letter(rng: random.Random) -> Task:
    """k f m b → l g n c; z, which has none, does not come up."""
    letters = rng.choices(LETTERS[:-1], k=4)
    return "Next", letters, [LETTERS[LETTERS.index(letter) + 1] for letter in letters]


def last(rng: random.Random) -> Task:
    """k f m b → b"""
    letters = rng.choices(LETTERS, k=4)
    return "Last", letters, letters[-1:]


def sort(rng: random.Random) -> Task:
    """7 2 9 4 → 2 4 7 9"""
    digits = rng.choices(DIGITS, k=4)
    return "Sort", digits, sorted(digits)


def largest(rng: random.Random) -> Task:
    """7 2 9 4 → 9"""
    digits = rng.choices(DIGITS, k=4)
    return "Largest", digits, [max(digits)]


def count(rng: random.Random) -> Task:
    """v x v y → 2: how often the first one comes."""
    letter, *letters = rng.choices("vwxyz", k=4)
    return "Count", [letter, *letters], [str(letters.count(letter) + 1)]


def opposite(rng: random.Random) -> Task:
    """hot big near dry → cold small far wet"""
    words = rng.choices(sorted(OPPOSITES), k=4)
    return "Opposite", words, [OPPOSITES[word] for word in words]


TASKS: dict[str, Callable[[random.Random], Task]] = {
    task.__name__: task for task in (copy, reverse, swap, upper, next_letter, last, sort, largest, count, opposite)
}


def make_rows(number: int, *, seed: int) -> list[dict[str, str]]:
    """`number` rows with fields task, prompt, response; no task twice, whatever its preamble, so any slices are disjoint.

    Kinds of task come equally often until one has no prompt left to give (count has 625); the order is random, so any slice
    holds all kinds alike.
    The response begins with a space: a word is then one and the same token wherever it stands.
    """
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < number:
        name = rng.choice(list(TASKS))
        instruction, items, answer = TASKS[name](rng)
        question = f"{instruction}: {' '.join(items)}\nAnswer:"
        rows[question] = {"task": name, "prompt": rng.choice(PREAMBLES) + question, "response": f" {' '.join(answer)}"}
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled
