"""A teacher that is the student's own past: t ← d·t + (1 − d)·θ after each of its steps, shard by shard, in float32.

(Tarvainen & Valpola 2017, arXiv 1703.01780, there for whole networks; with another text before the response it is self-distillation with
privileged information.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.teachers.live import LiveTeacher


class MovingAverage(LiveTeacher):
    """`model` begins as the student does, in its layout. Weights of 16 bits are rounded from the average, which is kept beside them."""

    def __init__(self, model: HiddenStateGPTModel, decay: float):
        super().__init__(model)
        self.decay = decay
        self.average = {name: weight.detach().float() for name, weight in model.named_parameters()}  # of float32 the weights themselves

    @torch.no_grad()
    def after_step(self, student: HiddenStateGPTModel) -> None:
        weights = dict(student.named_parameters())
        for name, average in self.average.items():
            average.lerp_(weights[name].float(), 1 - self.decay)
        self.after_load()

    def weights_to_save(self) -> dict[str, Tensor]:
        return self.average

    @torch.no_grad()
    def after_load(self) -> None:
        for name, weight in self.model.named_parameters():
            weight.copy_(self.average[name])
