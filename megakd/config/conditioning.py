"""What a teacher reads where the student reads its prompt: flags of training and of evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megakd.config.fields import POSITIVE, alike, flag

PRIMINGS = ("none", "teacher", "ground-truth", "confidence")  # by name; what they say stands in megakd/data/priming.py


@dataclass(frozen=True, kw_only=True)
class ConditioningConfig:
    """Text that only the teacher reads. Its rows are compared with the student's by the response's tokens, whatever stands in front."""

    teacher_priming: str = flag(
        "none",
        "text beside the question that only the teacher reads: teacher, ground-truth or confidence (the texts of response priming), a text "
        "of your own to stand before it, or the path of a .jinja file that has question, field and row; see docs/teachers.md",
        path=True,
        read_by="needs_teacher",
    )
    teacher_prompt_field: str = flag(
        "",
        "field of a row whose text only the teacher reads (the right answer, a worked solution, a hint): before the question, a blank line "
        "between; of a .jinja file it is the field",
        read_by="needs_teacher",
    )
    teacher_max_prompt_length: int | None = flag(
        None,
        "tokens of the teacher's prompt; rows with a longer one are left out; default: as many as it has positions for",
        range=POSITIVE,
        read_by="needs_teacher",
    )

    @property
    def priming(self) -> str:
        """Its name with dashes, a text or a path; `none` where it is empty."""
        named = self.teacher_priming.strip().replace("_", "-").lower()
        return named or "none" if named in ("", *PRIMINGS) else self.teacher_priming

    @property
    def adds_text(self) -> bool:
        """Whether the teacher is asked more than the student."""
        return self.priming != "none" or bool(self.teacher_prompt_field)

    def validation_errors(self) -> Iterator[str]:
        """A misspelled name would be taken for a text."""
        priming = self.priming
        if priming not in PRIMINGS and not priming.endswith(".jinja") and " " not in priming and (meant := alike(priming, PRIMINGS)):
            yield f"--teacher-priming {priming}: did you mean {meant}? A text of one word that is alike a name is taken for none"
