"""GSM8K: the number an answer gives, nothing by hand.

    robust     the number stated last, behind ####, in \\boxed{} or after "answer is", "answer:"; else the last number
    papers     the rules of response priming's evaluation (Goyal et al. 2024, arXiv):
        strict     the number in the first \\boxed{}, then the one after "the [final | correct] answer is"
        flexible   boxed, then the only distinct number of the first line, then phrase, then the last number

Commas in numbers are removed, and numbers are compared by value: 18, 18.0 and $18.00 are one answer. The robust rule also reads
fractions (1/2, 2 1/2, \\frac{1}{2}, ½), a minus that is written U+2212 or before the currency, spaces between thousands, and the
result of `3 + 4 = 7`; an exponent (m^2) is no number of its own; where a model goes on to ask itself another question, its answer has
ended. Numbers in words are none.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

from megakd.errors import UserError

SIGN = r"(?:(?<![\d)])-)?"  # a minus, unless it takes away from a number or a bracket
WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # 1,234 or 1234
NUMBER = re.compile(rf"{SIGN}(?:{WHOLE}(?:\.\d+)?|(?<!\d)\.\d+)")
BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
PHRASE = re.compile(r"the\s+(?:final\s+|correct\s+)?answer\s+is", re.IGNORECASE)
GOLD = "####"


def numbers(text: str) -> list[Fraction]:
    """All numbers of a text, in order. A minus counts as a sign where no number stands before it: 16-3 holds 16 and 3."""
    return [value_of(found) for found in NUMBER.findall(without_latex_commas(text))]


def value_of(written: str) -> Fraction:
    """Of one number, its commas removed."""
    return Fraction(written.replace(",", ""))


def without_latex_commas(text: str) -> str:
    """1{,}000 as 1,000."""
    return text.replace("{,}", ",")


def boxed(reply: str) -> Fraction | None:
    """The first number in the first box."""
    box = BOX.search(reply)
    return _first(numbers(box[1])) if box else None


def only_number_of_first_line(reply: str) -> Fraction | None:
    """None where the line has two different numbers, for neither is then the answer."""
    found = numbers(reply.strip().partition("\n")[0])
    return found[0] if len(set(found)) == 1 else None


def after_phrase(reply: str) -> Fraction | None:
    """The first number behind the first such phrase."""
    phrase = PHRASE.search(reply)
    return _first(numbers(reply[phrase.end() :])) if phrase else None


def last_number(reply: str) -> Fraction | None:
    """Wherever it stands."""
    return _first(numbers(reply)[::-1])


def _first(found: Sequence[Fraction]) -> Fraction | None:
    return found[0] if found else None


STATED = re.compile(rf"{GOLD}|{BOX.pattern}|\banswers?[\s*_]*(?:is\b|are\b|:|=)", re.IGNORECASE)
NEXT_QUESTION = re.compile(r"\n[\s#*]*(?:question|q|problem|instruction)\s*\d*\s*:", re.IGNORECASE)
CURRENCY = re.compile(r"\\?[$€£¥]")
THIN_SPACE = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))")  # 1 000
SUM = re.compile(r"\D{0,9}\d[\d\s.,+\-*/x×÷()%]*=")  # the left side of 3 + 4 = 7
EXPONENT = re.compile(r"\^\{?-?\d+\}?")
FRACTION = re.compile(r"(\d?)\s*(?:\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)(\d))|([¼-¾⅐-⅞]))")  # \frac{1}{2}, \frac12, ½
QUANTITY = re.compile(  # a fraction, with or without a whole number before it, or a number; 5/12/2020 and 1.5/2 are no fractions
    rf"(?P<sign>{SIGN})(?:(?P<whole>(?<![\d.,/]){WHOLE}) )?(?<![\d.,/])(?P<top>{WHOLE}) ?/ ?(?P<bottom>0*[1-9]\d*)(?![\d/]|[.,]\d| /)"
    rf"|{NUMBER.pattern}"
)


def plain(reply: str) -> str:
    """The answer as far as it is one to this question, its signs as NUMBER reads them and its fractions as 1/2."""
    own = NEXT_QUESTION.split(reply.strip())[0]
    own = THIN_SPACE.sub("", CURRENCY.sub("", own.replace("\u2212", "-").replace(r"\,", "")))
    return EXPONENT.sub("", FRACTION.sub(with_slash, own))


def with_slash(found: re.Match) -> str:
    r"""Of a match of FRACTION: \frac{1}{2} and ½ as 1/2, and behind a digit with a space between, so that 2½ is 2 1/2."""
    before, *parts, sign = found.groups()
    written = unicodedata.normalize("NFKC", sign).replace("\u2044", "/") if sign else "/".join(filter(None, parts))
    return f"{before} {written}" if before else written


def quantities(text: str) -> list[Fraction]:
    """All numbers of a text, in order, a fraction as one."""
    return [quantity_of(found) for found in QUANTITY.finditer(without_latex_commas(text))]


def quantity_of(found: re.Match) -> Fraction:
    """Of a match of QUANTITY."""
    if not found["top"]:
        return value_of(found[0])
    size = value_of(found["whole"] or "0") + value_of(found["top"]) / value_of(found["bottom"])
    return -size if found["sign"] else size


def stated_last(reply: str) -> Fraction | None:
    """The number of the last statement that has one."""
    reply = plain(reply)
    for found in reversed(list(STATED.finditer(reply))):
        said = found[1] or reply[found.end() :].lstrip(" \t\r\n*_:\\[(").partition("\n")[0]
        while left := SUM.match(said):
            said = said[left.end() :]
        if (number := _first(quantities(said))) is not None:
            return number
    return None


def last_of_own(reply: str) -> Fraction | None:
    """The last number before another question."""
    return _first(quantities(plain(reply))[::-1])


Rule = Callable[[str], Fraction | None]
ROBUST: tuple[Rule, ...] = (stated_last, last_of_own)
STRICT: tuple[Rule, ...] = (boxed, after_phrase)
FLEXIBLE: tuple[Rule, ...] = (boxed, only_number_of_first_line, after_phrase, last_number)
RULES = {"robust": {"gsm8k_robust": ROBUST}, "papers": {"gsm8k_strict": STRICT, "gsm8k_flexible": FLEXIBLE}}
RULES["both"] = RULES["robust"] | RULES["papers"]


def extract(reply: str, rules: Sequence[Rule]) -> Fraction | None:
    """What the first rule that finds a number finds; None where none does."""
    return next((number for rule in rules if (number := rule(reply)) is not None), None)


def gold_number(answer: str, where: str = "answer") -> Fraction:
    """The number after ####.

    Raises:
        UserError: there is none; the message begins with `where`.
    """
    if (gold := find_gold(answer)) is None:
        raise UserError(f"{where} has no number after {GOLD}; --gsm8k needs answers that end in `{GOLD} 18`")
    return gold


def find_gold(answer: str) -> Fraction | None:
    """The same, None where there is none."""
    _, marker, end = answer.rpartition(GOLD)
    return _first(quantities(plain(end))) if marker else None


def score(reply: str, gold: Fraction, rule: str = "robust") -> dict[str, float]:
    """One reply's scores by the rules of that name (`--gsm8k-rule`), each 0 or 100."""
    return {name: 100.0 * (extract(reply, rules) == gold) for name, rules in RULES[rule].items()}
