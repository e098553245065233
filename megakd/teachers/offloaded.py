"""A frozen teacher's weights on the host between its passes, so that a GPU has room for the student's step (`--teacher-offload`).

They never change: one copy lies in host memory (pinned beside a GPU, so that it comes at the bus's speed), another is on the device while
the model is `on_device`. The output layer stays on the device: losses apply it after the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.teachers.live import LiveTeacher


class OffloadedTeacher(LiveTeacher):
    """A live teacher whose weights are away but for its passes."""

    def __init__(self, model: HiddenStateGPTModel):
        super().__init__(model)
        self.weights = HostWeights(model)

    def on_device(self) -> AbstractContextManager[None]:
        return self.weights.on_device()

    def attach(self, *arguments):
        with self.on_device():
            return super().attach(*arguments)

    def learn(self, *arguments, **options):
        with self.on_device():
            return super().learn(*arguments, **options)

    def write(self, samples):
        with self.on_device():
            return super().write(samples)

    def read_layers(self, *arguments, **options):
        with self.on_device():
            return super().read_layers(*arguments, **options)

    def _read(self, *arguments, **options):
        with self.on_device():
            return super()._read(*arguments, **options)


class HostWeights:
    """Of one stage. Made when the weights have been loaded; from then on they are away."""

    def __init__(self, model: HiddenStateGPTModel):
        head = model.output_weight() if model.post_process else None
        self.device, self.users = model.layout.device, 0
        self.kept = [(param, on_host(param.data)) for param in model.parameters() if param is not head]
        self._put_away()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """On the device for the block, and for blocks within it."""
        if not self.users:
            for param, host in self.kept:
                param.data = host.to(self.device, non_blocking=True, copy=True)
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            if not self.users:
                self._put_away()

    def _put_away(self) -> None:
        for param, host in self.kept:
            param.data = host


def on_host(tensor: Tensor) -> Tensor:
    """A copy there."""
    return tensor.to("cpu", copy=True).pin_memory() if torch.cuda.is_available() else tensor.clone()
