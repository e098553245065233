"""Which parameters a checkpoint holds, and which rectangle of each lies on which (stage, tensor-parallel) rank.

megatron-core stacks equal layers: `decoder.layers.3.mlp.linear_fc1.weight` is row 3 of `decoder.layers.mlp.linear_fc1.weight`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from megakd.checkpointing.blocks import split
from megakd.models.model_provider import at_layer, family_of, uneven_split
from megakd.models.param_mapping import Mapping, Table
from megakd.models.shapes import megatron_shape

HEAD = "output_layer.weight"
FIRST_STAGE = ("embedding.", "project_in.")


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter under its key in the checkpoint; `layer` is its row of the stack, None for what is not in a layer."""

    key: str
    mapping: Mapping
    layer: int | None = None

    def place(self, shape: tuple[int, ...], lo: int, hi: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets and sizes in the stored tensor of the range lo..hi of the cut axis; `shape` is the full parameter's."""
        axis = self.mapping.axis or 0
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[axis], sizes[axis] = lo, hi - lo
        if self.layer is None:
            return tuple(offsets), tuple(sizes)
        return (self.layer, *offsets), (1, *sizes)


@dataclass(frozen=True)
class Grid:
    """A TP x PP layout of a model of `num_layers` layers; ranks are numbered as megatron-core does, tp before pp."""

    tp: int
    pp: int
    num_layers: int

    def stage(self, parameter: Parameter) -> int:
        """The stage that writes the parameter."""
        if parameter.layer is not None:
            return bisect_right(first_layers(self.num_layers, self.pp), parameter.layer) - 1
        return 0 if parameter.key.startswith(FIRST_STAGE) else self.pp - 1

    def stored_shape(self, parameter: Parameter, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the tensor under the parameter's key; `shape` is the full parameter's, of one layer."""
        return shape if parameter.layer is None else (self.num_layers, *shape)

    def ranges(self, parameter: Parameter, shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[int, int, int]]:
        """(rank, lo, hi) of the cut axis; what is not cut is written once, long ranges in pieces."""
        axis = parameter.mapping.axis
        size = shape[axis or 0]
        row_bytes = math.prod(shape) // size * itemsize
        for tp_rank in range(1 if axis is None else self.tp):
            for lo, hi in parameter.mapping.ranges(size, tp_rank, self.tp):
                for piece in split(lo, hi, row_bytes):
                    yield self.stage(parameter) * self.tp + tp_rank, *piece


def first_layers(num_layers: int, pp: int) -> list[int]:
    """The number of each stage's first layer; as in the model, the outer stages share what does not divide."""
    if not (ends := uneven_split(num_layers, pp)):
        return list(range(0, num_layers, num_layers // pp))
    first, last = ends.values()
    middle = (num_layers - first - last) // max(1, pp - 2)
    return [0, *(first + stage * middle for stage in range(pp - 1))]


def checkpoint_parameters(hf: PretrainedConfig, padded_vocab_size: int) -> list[Parameter]:
    """Every parameter once."""
    table = parameter_table(hf, padded_vocab_size)
    return [parameter for pattern, mapping in table.items() for parameter in _at_layers(pattern, mapping, hf.num_hidden_layers)]


def stored_shapes(hf: PretrainedConfig, padded_vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Of every key, layers stacked."""
    family, shapes = family_of(hf), {}
    for pattern in parameter_table(hf, padded_vocab_size):
        shape = megatron_shape(pattern, family, hf, padded_vocab_size)
        shapes[pattern.replace("*.", "")] = (hf.num_hidden_layers, *shape) if "*" in pattern else shape
    return shapes


def parameter_table(hf: PretrainedConfig, padded_vocab_size: int) -> Table:
    """The family's, without a tied head, which is the embedding and has no key of its own."""
    table = family_of(hf).table(hf, padded_vocab_size)
    return {pattern: mapping for pattern, mapping in table.items() if pattern != HEAD or not hf.tie_word_embeddings}


def _at_layers(pattern: str, mapping: Mapping, num_layers: int) -> list[Parameter]:
    if "*" not in pattern:
        return [Parameter(pattern, mapping)]
    return [Parameter(pattern.replace("*.", ""), at_layer(mapping, layer), layer) for layer in range(num_layers)]


def extra_state_key(parameter: Parameter, num_layers: int) -> str | None:
    """The key under which megatron-core looks for a linear layer's extra state."""
    layer, _, kind = parameter.key.rpartition(".")
    if parameter.layer is None or kind != "weight" or ".linear_" not in layer:
        return None
    return f"{layer}._extra_state/shard_{parameter.layer}_{num_layers}"
