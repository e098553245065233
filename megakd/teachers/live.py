"""Teachers in the learner's own layout: nothing travels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megakd.data.batch import Batch
from megakd.losses.token_loss import HeadRows
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.soft_prompt import SoftPrompt
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.schedules import supervised_hidden
from megakd.teachers.teacher import Teacher


class LiveTeacher(Teacher):
    """A model that reads what the learner reads."""

    def __init__(self, model: HiddenStateGPTModel):
        self.model = model

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout) -> list[HeadRows]:
        return self._read(batches, to, soft_prompt=None)

    def _read(self, batches: Sequence[Batch], to: ParallelLayout, soft_prompt: Tensor | None) -> list[HeadRows]:
        assert to is self.model.layout, "a live model is read in its own layout"
        return [HeadRows(hidden, self.model.output_weight()) for hidden in supervised_hidden(self.model, batches, soft_prompt)]


class SoftPromptedTeacher(LiveTeacher):
    """A frozen model behind a soft prompt that is trained (PromptKD)."""

    def __init__(self, model: HiddenStateGPTModel, prompt: SoftPrompt):
        super().__init__(model)
        self.prompt = prompt

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout) -> list[HeadRows]:
        return self._read(batches, to, self.prompt.vectors)
