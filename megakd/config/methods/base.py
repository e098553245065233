"""What a method's page may say."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from megakd.config.train import Config


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A method, to everybody who does not run it. Its fields are flags that no other method reads."""

    help: ClassVar[str]  # what it learns, in a few words for --help
    implementation: ClassVar[str]  # "module:class" of the page in megakd/methods/, imported when a run asks for it
    shares: ClassVar[tuple[type, ...]] = ()  # the groups of flags that it reads as other methods do
    needs_teacher: ClassVar[bool] = True  # --teacher-model is refused where it does not
    writes_responses: ClassVar[bool] = True  # in training, be it now and then: it reads the flags of sampling
    student_writes: ClassVar[bool] = True  # of these the student writes some: it reads --rollout-engine
    answers_prompts_often: ClassVar[bool] = False  # it reads --num-generations
    teacher_may_move: ClassVar[bool] = True  # it is asked anew in every iteration: --teacher-ema is refused where it is not
    learns_from_evaluations: ClassVar[bool] = False  # when they come decides results

    no_prompt: ClassVar[str] = ""  # what else can be done about a row without a prompt, which the method needs

    @property
    def soft_prompt_len(self) -> int:
        """Positions that a soft prompt takes of the teacher's."""
        return 0

    def work_with_model(self, config: Config) -> str:
        """What the method does with the teacher's model beside reading what it says, in words; "" where nothing."""
        return ""

    def temperature(self, config: Config) -> float:
        """Of the distributions that are compared."""
        return config.distillation.kd_temperature

    def learns_own_text(self, config: Config) -> bool:
        """Whether the student's own responses are learnt, be it now and then."""
        return False

    def no_response(self, usual: str) -> str:
        """What is said of a row without a response, which the method learns."""
        return usual

    def remarks(self) -> Iterator[str]:
        """What is allowed, but may not be meant."""
        yield from ()

    def validation_errors(self, config: Config) -> Iterator[str]:
        """What cannot be where this method is chosen, one line each."""
        yield from ()

    def unless(self, config: Config) -> dict[str, tuple[Any, str]]:
        """Flags that this method reads under a condition: whether it holds, and how a message says that it does not."""
        return {}

    def reads(self, flag: dataclasses.Field) -> bool:
        """Whether a flag is its own, of a group that it shares, or read by all that have a property of its (`flag(read_by=)`)."""
        if trait := flag.metadata.get("read_by"):
            return getattr(self, trait)
        return any(line.name == flag.name for group in (type(self), *self.shares) for line in dataclasses.fields(group))
