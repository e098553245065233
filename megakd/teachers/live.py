"""Teachers in the learner's own layout: nothing travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megakd.data.batch import Batch, Sample
from megakd.losses.token_loss import HeadRows
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.taps import stage_of, supervised_rows, watching
from megakd.reporting.stopwatch import Stopwatch
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.schedules import supervised_hidden
from megakd.teachers.teacher import Teacher


class LiveTeacher(Teacher):
    """A model that reads what is for the teacher: the learner's text, or its own where the batch has one."""

    def __init__(self, model: HiddenStateGPTModel):
        self.model = model
        self.attached: Any = None

    @property
    def layout(self) -> ParallelLayout:
        return self.model.layout

    def text(self, batches: Sequence[Batch]) -> list[Batch]:
        """What it reads of the learner's batches: the same rows, of which the same labels count."""
        return [batch.for_teacher for batch in batches]

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout) -> list[HeadRows]:
        return self._read(batches, to, soft_prompt=None)

    def read_prompted(self, batches: Sequence[Batch], *, to: ParallelLayout) -> list[HeadRows]:
        return self._read(batches, to, self.attached.soft_prompt)

    def attach(self, kind: Callable, *arguments: Any) -> Any:
        self.attached = kind(self.model, *arguments)
        return self.attached

    def learn(
        self, student: HiddenStateGPTModel, batches: Sequence[Batch], iteration: int, *, time: Stopwatch
    ) -> dict[str, float]:
        with time("teacher"):
            rows = LiveStudent(student).read(batches, to=student.layout)  # here the student is who is listened to
        return self.attached.step(self.text(batches), rows, iteration, time=time)

    def write(self, samples: Sequence[Sample]) -> list[Sample]:
        return self.attached.write(samples)

    def state(self) -> dict[str, Tensor]:
        return self.attached.state_tensors()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])

    def read_layers(self, batches: Sequence[Batch], layers: Sequence[int], *, to: ParallelLayout) -> list[dict[int, Tensor]]:
        """Hidden states [N, H] behind the layers (numbered from 1) at the supervised positions of every micro-batch, on every rank."""
        assert to is self.model.layout, "a live model is read in its own layout"
        batches, found = self.text(batches), {layer: [] for layer in layers}

        def keep(layer: int, hidden: Tensor) -> None:
            found[layer].append(supervised_rows(self.model, hidden, batches[len(found[layer])]))

        with watching(self.model, layers, keep):
            supervised_hidden(self.model, batches)
        rows = {layer: self._share(layer, found[layer], batches) for layer in layers}
        return [{layer: rows[layer][number] for layer in layers} for number in range(len(batches))]

    def _share(self, layer: int, rows: list[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
        """From the stage that has the layer to all."""
        layout, config = self.model.layout, self.model.config
        if layout.pp_size == 1:
            return rows
        shapes = [(batch.num_supervised, config.hidden_size) for batch in batches]
        rows = rows or [torch.empty(shape, dtype=config.params_dtype, device=layout.device) for shape in shapes]
        return [layout.broadcast_from_stage(x.contiguous(), stage_of(self.model, layer)) for x in rows]

    def _read(self, batches: Sequence[Batch], to: ParallelLayout, soft_prompt: Tensor | None) -> list[HeadRows]:
        assert to is self.model.layout, "a live model is read in its own layout"
        found = supervised_hidden(self.model, self.text(batches), soft_prompt)
        return [HeadRows(hidden, self.model.output_weight()) for hidden in found]


class LiveStudent(LiveTeacher):
    """The student in the teacher's place, to be learnt from: it reads its own text, behind a soft prompt where one is given."""

    def __init__(self, model: HiddenStateGPTModel, soft_prompt: Tensor | None = None):
        super().__init__(model)
        self.soft_prompt = soft_prompt

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout) -> list[HeadRows]:
        return self._read(batches, to, self.soft_prompt)

    def text(self, batches: Sequence[Batch]) -> list[Batch]:
        return list(batches)
