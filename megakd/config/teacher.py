"""Where a teacher's rows come from, other than a model as it is: flags of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megakd.config.fields import flag

if TYPE_CHECKING:
    from megakd.config.train import Config

CACHE_HELP = "folder that scripts/cache_teacher.py wrote: its targets are read in place of a teacher, and none is loaded"
Quantization = Literal["none", "int8", "int4"]
QUANTIZE_HELP = (
    "weights of the teacher's layers as codes of 8 bits, a scale a row, or of 4, a scale for 32 of a row, by torchao; what that changes on "
    "the first batch is told"
)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher's origin."""

    teacher_cache: str = flag("", CACHE_HELP, path=True, read_by="needs_teacher")
    teacher_quantize: Quantization = flag("none", QUANTIZE_HELP, read_by="needs_teacher")

    def validation_errors(self, config: Config) -> Iterator[str]:
        """What a teacher of this kind cannot do, one line each."""
        if self.teacher_cache:
            yield from (f"{reason}; give --teacher-model in place of --teacher-cache" for reason in self._beyond_a_store(config))

    def _beyond_a_store(self, config: Config) -> Iterator[str]:
        page = config.page
        if work := page.work_with_model(config):
            yield f"--method {config.method} {work}, and --teacher-cache has targets alone"
        if page.learns_own_text(config):
            yield f"--method {config.method} learns what the student writes, and --teacher-cache has the responses of the data alone"
        if self.teacher_quantize != "none":
            yield f"--teacher-quantize {self.teacher_quantize} is of a model, and scripts/cache_teacher.py has it too"
        if config.distillation.hidden_coef:
            yield "--hidden-coef matches the teacher's layers, and --teacher-cache has targets alone"
