"""Who learns and who teaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from megakd.config.fields import SHARE_BELOW_1, alias, flag

if TYPE_CHECKING:
    from megakd.config.train import Config

SELF = "self"  # as --teacher-model: the student's own folder


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Student and teacher: Hugging Face folders or native checkpoints."""

    model: Annotated[str, alias("--model-name-or-path", "--model-path")] = flag("", "the student's folder", path=True)
    teacher_model: Annotated[str | tuple[str, ...], alias("--teacher-model-name-or-path", "--teacher-model-path")] = flag(
        "",
        "the teacher's folder; self: the student as it begins, frozen; or several as math=DIR code=DIR, with --teacher-field",
        path=True,
        read_by="needs_teacher",
    )
    teacher_ema: float | None = flag(
        None,
        "with --teacher-model self: after each step the teacher becomes so much of itself and the rest of the student (of its adapters, if "
        "it has any); 0: the student of the step before; default: it stays as it began",
        range=SHARE_BELOW_1,
        read_by="needs_teacher",
    )
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "bf16 has fp32 master weights; auto: bf16 on a GPU, else fp32")
    hidden_dropout: float | None = flag(
        None, "the student's dropout while it learns; default: what its config.json says, 0 with minillm", range=SHARE_BELOW_1
    )
    attention_dropout: float | None = flag(
        None, "the student's attention dropout; default: what its config.json says, 0 with minillm", range=SHARE_BELOW_1
    )

    @property
    def teachers(self) -> dict[str, str]:
        """Folders by name; one alone has the empty name."""
        if isinstance(self.teacher_model, str):
            return {"": self.teacher_model} if self.teacher_model else {}
        return {name: path for name, _, path in (word.partition("=") for word in self.teacher_model)}

    @property
    def named_teachers(self) -> dict[str, str]:
        """The same where they have names, of which a row says one."""
        return {} if isinstance(self.teacher_model, str) else self.teachers

    def validation_errors(self, config: Config) -> Iterator[str]:
        """What cannot be, one line each."""
        if self.teacher_ema is None:
            return
        if config.lora.rank and config.training.reference_compat.teacher_dropout:
            given = f"--teacher-ema {self.teacher_ema} with --lora-rank {config.lora.rank}"
            yield f"{given}: such a teacher has no dropout; leave teacher-dropout out"
        if self.teacher_model != SELF:
            yield (
                f"--teacher-ema {self.teacher_ema} is an average of the student, and --teacher-model {self.teacher_model} another model; "
                "give --teacher-model self"
            )
        if not config.page.teacher_may_move:
            yield (
                f"--teacher-ema {self.teacher_ema}: --method {config.method} keeps what its teacher said over many steps; leave it out: "
                "the teacher then stays as it began"
            )
