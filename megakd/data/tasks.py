"""A small instruction data set of our own: ten kinds of task, each with one right answer, so that exact match means something.

    Sort the digits: 7 2 9 4        Write backwards: k f m b        Say the opposite: hot big
    Answer: 2 4 7 9                 Answer: b m f k                 Answer: cold small

Rows are short (16 ids on average, 20 at most), so that a small model learns them from nothing in a minute on a CPU.
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

Task = tuple[str, str, str]  # instruction, input, output


def draw(rng: random.Random, items: str, low: int = 3, high: int = 6) -> list[str]:
    return rng.choices(items, k=rng.randint(low, high))


def copy(rng: random.Random) -> Task:
    letters = draw(rng, LETTERS)
    return "Copy the letters", " ".join(letters), " ".join(letters)


def reverse(rng: random.Random) -> Task:
    letters = draw(rng, LETTERS)
    return "Write backwards", " ".join(letters), " ".join(reversed(letters))


def upper(rng: random.Random) -> Task:
    letters = draw(rng, LETTERS)
    return "Write in capitals", " ".join(letters), " ".join(letters).upper()


def next_letter(rng: random.Random) -> Task:
    letters = draw(rng, LETTERS[:-1], 2, 4)
    return "Write the next letter of each", " ".join(letters), " ".join(LETTERS[LETTERS.index(c) + 1] for c in letters)


def sort(rng: random.Random) -> Task:
    digits = draw(rng, DIGITS)
    return "Sort the digits", " ".join(digits), " ".join(sorted(digits))


def largest(rng: random.Random) -> Task:
    digits = draw(rng, DIGITS)
    return "Find the largest digit", " ".join(digits), max(digits)


def add(rng: random.Random) -> Task:
    numbers = [rng.randint(0, 9) for _ in range(3)]
    return "Add the numbers", " ".join(map(str, numbers)), str(sum(numbers))


def count(rng: random.Random) -> Task:
    letters = draw(rng, "xyz", 4, 7)
    return f"Count the letter {letters[0]}", " ".join(letters), str(letters.count(letters[0]))


def pick(rng: random.Random) -> Task:
    words = draw(rng, LETTERS, 4, 6)
    number = rng.randint(1, 4)
    return f"Give letter number {number}", " ".join(words), words[number - 1]


def opposite(rng: random.Random) -> Task:
    words = rng.choices(sorted(OPPOSITES), k=rng.randint(2, 3))
    return "Say the opposite", " ".join(words), " ".join(OPPOSITES[word] for word in words)


TASKS: dict[str, Callable[[random.Random], Task]] = {
    task.__name__: task for task in (copy, reverse, upper, next_letter, sort, largest, add, count, pick, opposite)
}


def make_rows(number: int, *, seed: int) -> list[dict[str, str]]:
    """`number` rows with fields task, prompt, response; no prompt twice, so any slices of them are disjoint.

    Kinds of task come equally often until one has no new prompt left to give (add has 1,000).
    The response begins with a space: a word is then one and the same token wherever it stands.
    """
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < number:
        name = rng.choice(list(TASKS))
        instruction, input, output = TASKS[name](rng)
        prompt = f"{instruction}: {input}\nAnswer:"
        rows[prompt] = {"task": name, "prompt": prompt, "response": f" {output}"}
    return list(rows.values())
