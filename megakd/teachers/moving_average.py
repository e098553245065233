"""A teacher that is the student's own past: t ← d·t + (1 − d)·θ after each of its steps, shard by shard, in float32.

(Tarvainen & Valpola 2017, arXiv 1703.01780, there for whole networks; with another text before the response it is self-distillation with
privileged information.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.lora import Adapter
from megakd.teachers.live import LiveTeacher


class MovingAverage(LiveTeacher):
    """`model` begins as the student does, in its layout. Weights of 16 bits are rounded from the average, which is kept beside them. Where
    adapters learn, each of their two factors is averaged, and the weights beside them are the student's own, which never change."""

    def __init__(self, model: HiddenStateGPTModel, decay: float):
        super().__init__(model)
        self.decay = decay
        self.average = {name: weight.detach().float() for name, weight in moving(model)}  # of float32 the weights themselves

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
        for name, weight in moving(self.model):
            weight.copy_(self.average[name])


def moving(model: HiddenStateGPTModel) -> Iterator[tuple[str, Tensor]]:
    """The weights that the student's steps change: of adapters theirs, or all."""
    adapters = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Adapter))
    return ((name, weight) for name, weight in model.named_parameters() if name.startswith(adapters or ("",)))
