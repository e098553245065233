"""Where a teacher's rows come from, other than a model as it is: flags of training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megakd.config.fields import flag

if TYPE_CHECKING:
    from megakd.config.train import Config

CACHE_HELP = "folder that scripts/cache_teacher.py wrote: its targets are read in place of a teacher, and none is loaded"
Quantization = Literal["none", "int8", "int4", "int8-dynamic", "fp8-dynamic"]
QUANTIZE_HELP = (
    "weights of the teacher's layers as codes of 8 bits, a scale a row, or of 4, a scale for 32 of a row, by torchao; dynamic: of 8 bits, "
    "and so is what they are multiplied with where no gradient passes, which is quicker; what that changes on the first batch is told"
)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher's origin."""

    teacher_cache: str = flag("", CACHE_HELP, path=True, read_by="needs_teacher")
    teacher_quantize: Quantization = flag("none", QUANTIZE_HELP, read_by="needs_teacher")
    teacher_field: str = flag(
        "", "field of a row that names the teacher it learns from, with --teacher-model math=DIR code=DIR", read_by="needs_teacher"
    )

    def validation_errors(self, config: Config) -> Iterator[str]:
        """What a teacher of this kind cannot do, one line each."""
        if self.teacher_cache:
            yield from (f"{reason}; give --teacher-model in place of --teacher-cache" for reason in self._beyond_a_store(config))
        if self.teacher_quantize != "none" and config.models.teacher_ema is not None:
            yield f"--teacher-quantize {self.teacher_quantize} freezes the weights that --teacher-ema moves; leave one of them out"
        parallel = config.teacher_parallel
        if elsewhere := parallel.flags_given(config.parallel) or "--teacher-offload" * parallel.teacher_offload:
            yield from self._here(config, elsewhere)
        if config.models.named_teachers:
            yield from self._beyond_several(config)
        elif self.teacher_field:
            yield f"--teacher-field {self.teacher_field} chooses among several teachers; name them, as in --teacher-model math=DIR code=DIR"

    def _here(self, config: Config, elsewhere: str) -> Iterator[str]:
        """What is only built for a teacher in the student's layout that stays on its device; several may have another one, or be away."""
        if self.teacher_cache:
            yield f"{elsewhere} is of a model, and --teacher-cache loads none; leave it out"
        if self.teacher_quantize != "none":
            yield f"--teacher-quantize {self.teacher_quantize} is for a teacher that stays with the student; leave it out, or {elsewhere}"
        if config.models.named_teachers and config.teacher_parallel.teacher_ranks:
            yield f"--teacher-ranks {config.teacher_parallel.teacher_ranks} are one teacher's; leave it out, or give one --teacher-model"

    def _beyond_several(self, config: Config) -> Iterator[str]:
        words, names = config.models.teacher_model, config.models.named_teachers
        if unnamed := [word for word in words if not all(word.partition("="))]:
            yield f"--teacher-model {unnamed[0]} is one of several and has no name; name each, as in math=DIR code=DIR"
        if len(names) < len(words):
            yield f"--teacher-model {' '.join(words)} gives one name twice; name each otherwise"
        if not self.teacher_field:
            yield f"--teacher-model has the teachers {', '.join(names)}; say with --teacher-field which field of a row names its own"
        if self.teacher_cache:
            yield "--teacher-cache holds the targets of one teacher; leave it out, or all --teacher-model but one"
        if work := config.page.work_with_model(config):
            yield f"--method {config.method} {work}, which several can only be read as; give one --teacher-model"
        if config.distillation.hidden_coef:
            yield "--hidden-coef matches the layers of one teacher; give one --teacher-model, or leave it out"

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
        if config.models.teacher_ema is not None:
            yield f"--teacher-ema {config.models.teacher_ema} moves a model, and --teacher-cache has targets alone"
