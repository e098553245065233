"""The number of a reply: by the papers' rules, strict and flexible, and by the robust one; written replies, and all of GSM8K's own."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from megakd.errors import UserError
from megakd.evaluation import gsm8k

HALF = Fraction(1, 2)
REPLIES = [  # reply, strict, flexible, robust
    # boxed
    (r"so \boxed{18}. The answer is 5", 18, 18, 5),  # the papers: the box before everything; robust: what is stated last
    (r"\boxed{\$1{,}800.50} and \boxed{3}", Fraction("1800.5"), Fraction("1800.5"), 3),
    (r"\boxed{x}, the answer is 7 or 8", 7, 7, 7),  # a box without a number is none
    (r"Thus \( \boxed{42} \).", 42, 42, 42),
    (r"\boxed{-7}", -7, -7, -7),
    (r"\boxed{18 \text{ eggs}}, of 20", 18, 18, 18),
    (r"\boxed { 9 }", 9, 9, 9),
    (r"\boxed{x = 12}", 12, 12, 12),
    (r"\boxed{3 + 4 = 7}", 3, 3, 7),
    (r"It is \boxed{1,234,567}.", 1234567, 1234567, 1234567),
    (r"\boxed{50\%}", 50, 50, 50),
    (r"\boxed{12", None, 12, 12),  # never closed: no box
    # commas and spaces between thousands
    ("#### 9,000", None, 9000, 9000),
    ("The answer is 1,450,000 dollars.", 1450000, 1450000, 1450000),
    ("The answer is $12,345.67", Fraction("12345.67"), Fraction("12345.67"), Fraction("12345.67")),
    ("1\u202f234 dollars", None, 234, 1234),
    ("The answer is 1{,}800.", 1800, 1800, 1800),
    (r"The answer is 1\,800.", 1, 1, 1800),
    ("First 1,000, then 2,000", None, 2000, 2000),
    ("Add 3,4 and 5", None, 5, 5),
    ("12,34", None, 34, 34),  # no thousands
    # signs
    ("The answer is \u22125.", 5, 5, -5),
    ("#### \u22121,234.50", None, Fraction("1234.5"), Fraction("-1234.5")),
    ("It lost -$5", None, 5, -5),
    ("16-$3", None, 3, 3),
    ("16-3", None, 3, 3),
    ("(4+2)-1", None, 1, 1),
    ("The answer is -12 degrees", -12, -12, -12),
    ("12 eggs\nThe final answer is: **-1,234**.", -1234, 12, -1234),
    ("-4", None, -4, -4),
    # units, currencies, per cent
    ("The answer is $ 18.00 a day", 18, 18, 18),
    ("The answer is €18", 18, 18, 18),
    ("The answer is 18%", 18, 18, 18),
    ("She needs 18 eggs", None, 18, 18),
    ("The area is 18 m^2", None, 2, 18),
    ("The answer is:\n\n18 eggs. That leaves 3", 18, 18, 18),
    ("the answer is 5kg", 5, 5, 5),
    ("The answer is .5 litres", HALF, HALF, HALF),
    ("The answer is 0.50.", HALF, HALF, HALF),
    # fractions
    ("1/2", None, 2, HALF),
    ("The answer is 1/2.", 1, 1, HALF),
    ("The answer is -3/4 of it", -3, -3, Fraction(-3, 4)),
    ("The answer is 2 1/2 hours", 2, 2, Fraction(5, 2)),
    ("#### 2½", None, 2, Fraction(5, 2)),
    ("The answer is ½", None, None, HALF),
    ("The answer is -½", None, None, -HALF),
    (r"\boxed{\frac{1}{2}}", 1, 1, HALF),
    (r"\boxed{-\dfrac{3}{4}}", 3, 3, Fraction(-3, 4)),
    (r"\boxed{2\frac12}", 2, 2, Fraction(5, 2)),
    ("The answer is 1,000/3", 1000, 1000, Fraction(1000, 3)),
    ("It takes 6 / 4", None, 4, Fraction(3, 2)),
    ("On 5/12/2020", None, 2020, 2020),  # a date
    ("1/0", None, 0, 0),  # no number: two
    ("1.5/2", None, 2, 2),
    ("Half of it: 3/4 = 0.75", None, Fraction("0.75"), Fraction("0.75")),
    # several numbers
    ("18\nno, 20", None, 18, 20),  # one number in the first line
    ("18 is 18.0\nno, 20", None, 18, 20),
    ("18 of 20\nmakes 2", None, 2, 2),  # two numbers there: the last of all
    ("3 and 4\nthe Correct answer is $ 7, not 9", 7, 7, 7),
    ("16-3-4=9\n#### 9,000", None, 9000, 9000),
    ("The answer is 18, because 20 - 2 = 18 and 3 = 3", 18, 18, 18),
    ("The answer is 3 + 4 = 7 dollars, 1 way of 2", 3, 3, 7),
    ("The answer is 3? No. The answer is 4.", 3, 3, 4),
    ("To answer this we need 3 numbers: 4", None, 4, 4),
    ("**Answer:** 6 of 7", None, 7, 6),
    ("The answers are 3 and 4", None, 4, 3),
    ("18 of 20\nQ2: what of 7", None, 7, 20),  # goes on to ask itself another question
    ("#### 5\n\n### Instruction: Add 3\n#### 8", None, 5, 5),
    ("Step 1: 3 + 4 = 7\nStep 2: 7 * 2 = 14", None, 14, 14),
    # none
    ("I do not know", None, None, None),
    ("", None, None, None),
    ("The answer is twelve", None, None, None),  # words are none
    ("The answer is twelve, of 5", 5, 5, 5),
    (r"\boxed{}", None, None, None),
    ("####", None, None, None),
]


@pytest.mark.parametrize(("reply", "strict", "flexible", "robust"), REPLIES, ids=[repr(reply[0])[:40] for reply in REPLIES])
def test_the_number_of_a_written_reply(reply, strict, flexible, robust):
    found = [gsm8k.extract(reply, rules) for rules in (gsm8k.STRICT, gsm8k.FLEXIBLE, gsm8k.ROBUST)]
    assert found == [strict, flexible, robust]


def test_enough_replies_are_written():
    assert len(REPLIES) >= 60 and len({reply for reply, *_ in REPLIES}) == len(REPLIES)


@pytest.mark.parametrize(
    ("reply", "answer", "strict", "flexible"),
    [("The answer is 18.00", "#### 18", 100, 100), ("1000", "#### 1,000", 0, 100), ("-4", "x\n#### -3", 0, 0)],
)
def test_replies_are_scored_strictly_and_flexibly(reply, answer, strict, flexible):
    papers = gsm8k.score(reply, gsm8k.gold_number(answer), "papers")
    assert papers == {"gsm8k_strict": strict, "gsm8k_flexible": flexible}
    assert gsm8k.score(reply, gsm8k.gold_number(answer), "both") == papers | gsm8k.score(reply, gsm8k.gold_number(answer))


@pytest.mark.parametrize(("answer", "number"), [("x\n#### \u22125", -5), ("#### $1,080", 1080), ("#### 1/2", HALF), ("#### 3 #### 4", 4)])
def test_a_gold_answer_has_the_number_behind_its_last_mark(answer, number):
    assert gsm8k.gold_number(answer) == number


@pytest.mark.parametrize("answer", ["18", "#### eighteen", "18 ####"])
def test_a_gold_answer_without_a_number_is_refused(answer):
    with pytest.raises(UserError, match=r"test\.jsonl line 3 has no number after ####; --gsm8k needs answers that end in `#### 18`"):
        gsm8k.gold_number(answer, "test.jsonl line 3")


# ---- all of GSM8K

SPLITS = {"train": 7473, "test": 1319}


@pytest.fixture(scope="module", params=SPLITS)
def published(request, data_folder) -> list[str]:
    """The answers of one split."""
    file: Path = data_folder / "gsm8k" / f"{request.param}.jsonl"
    if not file.is_file():
        pytest.skip(f"no {file}; set MEGAKD_TEST_DATA to a folder with GSM8K")
    answers = [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(answers) == SPLITS[request.param]
    return answers


def test_every_published_answer_has_its_number(published):
    for answer in published:
        written = answer.rpartition("\n#### ")[2]
        assert gsm8k.gold_number(answer) == int(written.replace(",", "")), answer


WRITTEN_AS = {  # of the solution without its #### line, and the right number as it is written
    "GSM8K's own": (lambda solution, number: f"{solution}\n#### {number}"),
    "a heading, then the phrase": (lambda solution, number: f"Step 1:\n{solution}\nThe answer is {number}."),
    "another statement first": (lambda solution, number: f"The answer is 3? No.\n{solution}\nThe final answer is: **${number}**."),
    "a box with a unit": (lambda solution, number: rf"{solution} \\[ \\boxed{{\\${number.replace(',', '{,}')} \\text{{ eggs}}}} \\] as 2 of 2"),
    "a question of its own behind": (lambda solution, number: f"{solution}\n**Answer:** {number}%\n\nQuestion: 3 eggs?\nAnswer: 5"),
    "a sum": (lambda solution, number: f"{solution}\nThe answer is {number} + 0 = {number} dollars, 1 way of 2"),
}


@pytest.mark.parametrize("name", WRITTEN_AS)
def test_the_robust_rule_finds_the_number_of_every_published_answer(published, name):
    for answer in published:
        solution, _, number = answer.rpartition("\n#### ")
        assert gsm8k.score(WRITTEN_AS[name](solution, number), gsm8k.gold_number(answer)) == {"gsm8k_robust": 100}, answer


def test_the_papers_rules_find_the_stated_number_of_every_published_answer(published):
    for answer in published:
        number = answer.rpartition("\n#### ")[2]
        assert gsm8k.score(f"... The answer is ${number}.", gsm8k.gold_number(answer), "papers") == {
            "gsm8k_strict": 100,
            "gsm8k_flexible": 100,
        }


def test_the_papers_rules_mislead_on_gsm8ks_own_answers(published):
    """The shares that the documentation names: they are the rules', not an error of the extraction."""
    scores = [gsm8k.score(answer, gsm8k.gold_number(answer), "papers") for answer in published]
    shares = [round(sum(score[name] for score in scores) / len(scores), 2) for name in ("gsm8k_strict", "gsm8k_flexible")]
    assert shares == {1319: [0, 98.03], 7473: [0.04, 98.5]}[len(scores)]
