"""Priming: text beside the question that only the teacher reads.

The named ones are those of "Enhancing Knowledge Distillation for LLMs with Response-Priming Prompting" (Goyal et al. 2024), where
ground-truth is called ai-to-ai and confidence reverseKL in the files. A text of one's own stands before the question as theirs do, a space
between; a .jinja file says itself what stands where.
"""

from collections.abc import Callable
from pathlib import Path

from megakd.data.templates import jinja_template
from megakd.errors import UserError

Priming = Callable[[str, str, dict], str]
"""From the question, the row's text for the teacher ("" where there is none) and all fields of the row to what the teacher is asked."""

NAMED = {  # what stands before the question and after it
    "none": ("", ""),
    "teacher": (
        "As a teacher, guide your student through solving the question below. Provide a clear, simple explanation for someone unfamiliar "
        "with the problem. ",
        "",
    ),
    "ground-truth": (
        "As a smart language model, provide a detailed answer that is clear and feasible for smaller models to understand and learn from "
        "without losing too much detail. ",
        "",
    ),
    "confidence": ("", " Briefly double-check that your answer is correct once done."),
}


def open_priming(name: str) -> Priming:
    """
    Raises:
        UserError: it is a path without a template.
    """
    if name.endswith(".jinja"):
        if not Path(name).is_file():
            raise UserError(f"--teacher-priming {name}: no such file; give {', '.join(NAMED)}, a text or the path of a .jinja file")
        return jinja_template(Path(name), "--teacher-priming", ("question", "field", "row"))
    return around(*NAMED.get(name, (spaced(name), "")))


def spaced(text: str) -> str:
    """Ready for a question to follow."""
    return text if text[-1].isspace() else text + " "


def around(before: str, after: str) -> Priming:
    """The row's own text, where it has one, comes between the priming and the question."""
    return lambda question, field, row: before + (f"{field}\n\n" if field else "") + question + after
