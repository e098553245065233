"""What a learner may ask a teacher for, wherever it lives and whatever it reads.

    rows = teacher.read(batches, to=layout)      one HeadRows or TopKRows a micro-batch, on the last stage of the learner's layout,
                                                 in its data-parallel and vocabulary shards; an empty list on its other stages

Row n of a micro-batch is the teacher's distribution at the n-th supervised position of the learner's batch: of the same token of the
response, whatever the teacher reads in front of it (`Batch.for_teacher`). The learner is the student; in PromptKD's step (b) it is the
soft prompt, and the student is what is read.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megakd.data.batch import Batch
from megakd.losses.token_loss import Rows
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.runtime.parallel_layout import ParallelLayout


class Teacher:
    """A source of rows. `model` is the teacher as a model, for methods that sample from it or differentiate it; None where it is
    only ever read."""

    model: HiddenStateGPTModel | None = None
    truncates = False  # whether its rows are TopKRows, whose bias is logged

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout) -> list[Rows]:
        """The rows of every micro-batch: no gradient, no dropout."""
        raise NotImplementedError

    def follow(self, student: HiddenStateGPTModel) -> None:
        """What it does when the student has made a step: nothing, unless it is made of the student."""

    def learnt_weights(self) -> dict[str, Tensor]:
        """Shards of its model's weights by name, of which a checkpoint is the only copy: none of a teacher that stays as it was loaded."""
        return {}

    def go_on(self) -> None:
        """What it does when a checkpoint has filled its `learnt_weights`."""
