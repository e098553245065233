"""A decode step as a CUDA graph: recorded once, replayed with new inputs, so that a step costs one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CapturedStep:
    """`step` with inputs and outputs at fixed addresses; an output is overwritten by the next call."""

    def __init__(self, step: Callable[..., list[Tensor]], *inputs: Tensor):
        self.inputs = [x.clone() for x in inputs]
        step(*self.inputs)  # libraries and communicators set themselves up here, which a capture forbids
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL's watchdog is another thread
            self.outputs = step(*self.inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        for fixed, new in zip(self.inputs, inputs):
            fixed.copy_(new)
        self.graph.replay()
        return self.outputs
