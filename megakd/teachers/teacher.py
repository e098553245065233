"""What a learner may ask a teacher for, wherever it lives and whatever it reads.

    rows = teacher.read(batches, to=layout)      one HeadRows or TopKRows a micro-batch, on the last stage of the learner's layout,
                                                 in its data-parallel and vocabulary shards; an empty list on its other stages

Row n of a micro-batch is the teacher's distribution at the n-th supervised position of the learner's batch: of the same token of the
response, whatever the teacher reads in front of it (`Batch.for_teacher`). A list, or Windows of a teacher whose rows travel. The learner
is the student; in PromptKD's step (b) it is the soft prompt, and the student is what is read.

What a method does where the teacher lives (answer prompts, train a soft prompt) is attached to it: `attach` makes it of the teacher's
model, there. A teacher that is only ever read has no model, and nothing can be attached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from megakd.data.batch import Batch, Sample
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.reporting.stopwatch import Stopwatch
from megakd.runtime.parallel_layout import Grid, ParallelLayout
from megakd.schedules import Context


class Teacher:
    """A source of rows. `model` is the teacher as a model in the learner's layout, for methods that mix it into sampling or match its
    layers; None where there is none."""

    model: HiddenStateGPTModel | None = None
    truncates = False  # whether its rows are TopKRows, whose bias is logged

    @property
    def layout(self) -> ParallelLayout | Grid | None:
        """Where it lives: its TP × PP × DP."""
        return None

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout) -> Context:
        """The rows of every micro-batch: no gradient, no dropout. All of the learner's ranks ask, be it about nothing."""
        raise NotImplementedError

    def attach(self, kind: Callable, *arguments: Any) -> Any:
        """Make `kind(model, *arguments)` beside the teacher's model; returned where that is on this rank, else None."""
        raise NotImplementedError

    def read_prompted(self, batches: Sequence[Batch], *, to: ParallelLayout) -> Context:
        """`read` behind the `soft_prompt` of what is attached."""
        raise NotImplementedError

    def learn(
        self, student: HiddenStateGPTModel, batches: Sequence[Batch], iteration: int, *, time: Stopwatch
    ) -> dict[str, float]:
        """What is attached makes a `step` on what the student says; what that logs, on every rank."""
        raise NotImplementedError

    def write(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same with the answers that what is attached writes."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """The `state_tensors` of what is attached, on every rank."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Fill them in place."""

    def on_device(self) -> AbstractContextManager[None]:
        """Around a use of `model` that is none of the above: its weights are on the device."""
        return nullcontext()

    def on_teacher_ranks(self, work: Callable, *arguments: Any) -> None:
        """Let ranks that are the teacher's alone call `work(*arguments)`: their part in what all ranks of the job do together."""

    def shut_down(self) -> None:
        """Let them go: nothing will be asked any more."""

    def after_step(self, student: HiddenStateGPTModel) -> None:
        """What it does when the student has made a step: nothing, unless it is made of the student."""

    def weights_to_save(self) -> dict[str, Tensor]:
        """Shards of its model's weights by name, of which a checkpoint is the only copy: none of a teacher that stays as it was loaded."""
        return {}

    def after_load(self) -> None:
        """What it does when a checkpoint has filled its `weights_to_save`."""
