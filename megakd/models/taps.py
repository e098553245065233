"""Hidden states of chosen layers: seen while a model runs, and pulled on by a loss of their own.

A layer hands on what it always did. Where a loss was taken of its output, that loss's gradient joins what comes back from the layers
behind, so that a stage in the middle of a pipeline may have losses of which no other stage has to know:

    handed on = h                                d objective / d h  +=  d loss(h) / d h

Layers are numbered over the whole model, from 1: layer k's output is what k layers have made of the embedding.
S sequence, B batch, H hidden, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor

from megakd.data.batch import Batch
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.schedules import supervised


class PulledOn(torch.autograd.Function):
    """hidden as it is; its gradient is joined by that of `loss`, a number that was computed from it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.shape = loss.shape
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(ctx.shape, dtype=torch.float32)


@contextmanager
def watching(
    model: HiddenStateGPTModel, layers: Sequence[int], see: Callable[[int, Tensor], Tensor | None]
) -> Iterator[None]:
    """While the block runs, `see(layer, hidden)` is asked behind each of the layers that this stage has; what it returns is handed
    on in place of the hidden states, None leaves them."""

    def hook(layer):
        def behind(module, inputs, output):
            hidden, *rest = output
            seen = see(layer, hidden)
            return output if seen is None else (seen, *rest)

        return behind

    first = first_layers(model)[model.layout.pp_rank]
    mine = {layer: model.decoder.layers[layer - first] for layer in layers if first <= layer < first + len(model.decoder.layers)}
    handles = [module.register_forward_hook(hook(layer)) for layer, module in mine.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_layers(model: HiddenStateGPTModel) -> list[int]:
    """The number of each stage's first layer."""
    sizes = [get_num_layers_to_build(model.config, pp_rank=stage) for stage in range(model.layout.pp_size)]
    return [1, *(1 + end for end in accumulate(sizes[:-1]))]


def stage_of(model: HiddenStateGPTModel, layer: int) -> int:
    """The pipeline stage that has the layer."""
    return sum(first <= layer for first in first_layers(model)) - 1


def supervised_rows(model: HiddenStateGPTModel, hidden: Tensor, batch: Batch) -> Tensor:
    """[N, H] of a layer's output, whole on every tensor-parallel rank; the gradient that comes back must be so, too."""
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=model.tp_group)
    return supervised(hidden[: batch.seq_length], batch)
