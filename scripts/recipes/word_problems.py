"""Word problems in GSM8K's form, with worked solutions, that a model of a million weights learns in minutes.

    question    Ann has 4 eggs. Tom has 7 eggs. Tom finds 5, then Tom gives away 3. How many eggs has Tom now?
    answer      7 + 5 = 12
                12 - 3 = 9
                The answer is 9.
                #### 9

Two to four steps, every number from 0 to 40; somebody else's eggs stand in front of every second question. To say the number at once a
model has to do all steps within one token; written out, each step is small. That is what a priming text can ask a teacher for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = ("Tom", "Ann", "Max", "Eva", "Leo", "Ida", "Sam", "Zoe")
ITEMS = ("eggs", "cards", "shells", "coins", "apples", "books", "stamps", "pens")
GAINS, LOSSES = ("finds", "buys", "gets"), ("gives away", "loses", "sells")
LARGEST = 40


@dataclass(frozen=True)
class Problem:
    """A question and the steps of its solution."""

    question: str
    steps: tuple[tuple[int, str, int, int], ...]  # 7 + 5 = 12

    @property
    def number(self) -> int:
        """The right answer."""
        return self.steps[-1][3]

    @property
    def worked(self) -> list[str]:
        """A line a step."""
        return [f"{have} {sign} {change} = {left}" for have, sign, change, left in self.steps]

    @property
    def check(self) -> str:
        """The last step, undone."""
        have, sign, change, left = self.steps[-1]
        return f"Check: {left} {'-' if sign == '+' else '+'} {change} = {have}"

    def answer(self, *lines: str) -> str:
        """In GSM8K's form, after these lines."""
        return "\n".join([*lines, f"The answer is {self.number}.", f"#### {self.number}"])


def problem(rng: random.Random) -> Problem:
    """One at random."""
    (name, other), items = rng.sample(NAMES, 2), rng.choice(ITEMS)
    have, told, steps = rng.randint(2, 15), [], []
    beginning = f"{name} has {have} {items}."
    for _ in range(rng.randint(2, 4)):
        change = rng.randint(1, 9)
        sign = "-" if have + change > LARGEST or (have >= change and rng.random() < 0.5) else "+"
        left = have + change if sign == "+" else have - change
        told.append(f"{name} {rng.choice(GAINS if sign == '+' else LOSSES)} {change}")
        steps.append((have, sign, change, left))
        have = left
    aside = f"{other} has {rng.randint(2, 15)} {items}. " if rng.random() < 0.5 else ""
    return Problem(f"{aside}{beginning} {', then '.join(told)}. How many {items} has {name} now?", tuple(steps))


def problems(number: int, *, seed: int) -> list[Problem]:
    """So many, no question twice, so that any slices are disjoint."""
    rng, found = random.Random(seed), {}
    while len(found) < number:
        made = problem(rng)
        found[made.question] = made
    return list(found.values())
