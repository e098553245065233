"""A model in memory under Hugging Face names: whole tensors, one at a time, on every rank of its replica.

The ranks of a stage have shards of a parameter, the other stages none of it: the stage's shards go to the others, then each rank joins
them. What comes is what an export would write: rows of the padded vocabulary are left out, adapters are in the weights beside which they
stand, a tied head is not there. So much memory is taken beside the model as its largest tensor needs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.checkpointing.parameters import Grid, Parameter, checkpoint_parameters
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.linear import Adapted
from megakd.models.lora import merged_weight
from megakd.models.model_provider import family_of, parameter_mappings
from megakd.models.param_mapping import HFTensor, Source, Vocabulary
from megakd.models.shapes import megatron_shape


def skipped_rows(model: HiddenStateGPTModel, source: Source) -> dict[str, Tensor]:
    """Rows at the head of a tensor that no parameter holds (OPT's two unused positions), by the tensor's name: those of its folder."""
    counts = family_of(model.hf_config).skipped_rows
    return {name: source.read(name, (slice(0, count), slice(None))).clone() for name, count in counts.items()}


@torch.no_grad()
def live_tensors(model: HiddenStateGPTModel, skipped: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor, layer after layer, as Hugging Face stores it. All ranks of the replica take part in each.

    skipped: what `skipped_rows` has read.
    """
    here, parts = parameters_here(model), defaultdict(dict)
    parameters = checkpoint_parameters(model.hf_config, model.vocab_size)
    for parameter in sorted(parameters, key=lambda parameter: -1 if parameter.layer is None else parameter.layer):
        for tensor, piece in parameter.mapping.to_hf(whole(model, parameter, here)):
            found = parts[tensor.name]
            found[tensor.part] = piece[: model.real_vocab_size] if isinstance(parameter.mapping, Vocabulary) else piece
            if len(found) == tensor.parts:
                yield tensor.name, stored(tensor, parts.pop(tensor.name), skipped)


def parameters_here(model: HiddenStateGPTModel) -> dict[object, tuple[torch.nn.Parameter, Adapted | None]]:
    """This rank's parameters by their mapping, each with the layer whose adapters are to be added."""
    adapted = {linear.weight: linear for linear in model.modules() if isinstance(linear, Adapted) and linear.adapters}
    return {mapping: (param, adapted.get(param)) for param, mapping in parameter_mappings(model)}


def whole(model: HiddenStateGPTModel, parameter: Parameter, here: Mapping) -> Tensor:
    """The full Megatron parameter, on every rank."""
    layout, axis = model.layout, parameter.mapping.axis
    shape = list(megatron_shape(parameter.key, family_of(model.hf_config), model.hf_config, model.vocab_size))
    part = shape if axis is None else [size // layout.tp_size if i == axis else size for i, size in enumerate(shape)]
    stage = Grid(layout.tp_size, layout.pp_size, model.hf_config.num_hidden_layers).stage(parameter)
    if layout.pp_rank == stage:
        param, linear = here[parameter.mapping]
        shard = (merged_weight(linear) if linear else param.detach()).contiguous()
    else:
        shard = torch.empty(part, dtype=model.config.params_dtype, device=layout.device)
    layout.broadcast_from_stage(shard, stage)
    return shard if axis is None or layout.tp_size == 1 else joined(model, parameter, shard, shape)


def joined(model: HiddenStateGPTModel, parameter: Parameter, shard: Tensor, shape: list[int]) -> Tensor:
    """Of all tensor-parallel ranks' shards, each in the ranges that it holds."""
    layout, axis = model.layout, parameter.mapping.axis
    shards = [torch.empty_like(shard) for _ in range(layout.tp_size)]
    dist.all_gather(shards, shard, group=layout.tp_group)
    full = shard.new_empty(shape)
    for tp_rank, part in enumerate(shards):
        ranges = parameter.mapping.ranges(shape[axis], tp_rank, layout.tp_size)
        for (lo, hi), piece in zip(ranges, part.split([hi - lo for lo, hi in ranges], axis), strict=True):
            full.narrow(axis, lo, hi - lo).copy_(piece)
    return full


def stored(tensor: HFTensor, parts: Mapping[int, Tensor], skipped: Mapping[str, Tensor]) -> Tensor:
    """A tensor of its parts, along its output axis, in Hugging Face's orientation."""
    rows = [parts[number] for number in sorted(parts)]
    if tensor.skip_rows:
        rows.insert(0, skipped[tensor.name].to(rows[0]))
    joined = torch.cat(rows) if len(rows) > 1 else rows[0]
    return (joined.t() if tensor.transposed and joined.ndim == 2 else joined).contiguous()
