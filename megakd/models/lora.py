"""LoRA (Hu et al. 2021, arXiv 2106.09685): W x + (α / r) B A x with W frozen, as PEFT computes it, and cut over ranks as W is cut.

    column-parallel    W [rows / tp, in]    A [r, in] on every rank         B [rows / tp, r]
    row-parallel       W [out, in / tp]     A [r, in / tp]                  B [out, r] on every rank

What travels between ranks is r wide. An adapter belongs to a Hugging Face module; of the q, k and v that megatron joins in one layer,
each has its own, whose B has that module's rows of the layer, in the layer's order (`own_rows`).
"""

from __future__ import annotations

import math
import random
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn
from transformers import PretrainedConfig

from megakd.config import LoRAConfig
from megakd.errors import UserError
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.linear import Adapted, ColumnLinear, RowLinear
from megakd.models.model_provider import family_of
from megakd.models.param_mapping import Mapping
from megakd.models.shapes import Shape, hf_shapes

LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
DEFAULT_TARGETS = {"gpt2": ("c_attn",)}  # PEFT's; of other families the usual ones
USUAL_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR = "all-linear"
WITHOUT = ("project_in", "experts")  # to which PEFT gives adapters, too


class Adapter(nn.Module):
    """What one Hugging Face module's adapter adds to the layer that holds it; `rows` are its rows of that layer, None: all."""

    reads_parts: bool  # whether each rank reads columns of its own
    cut: dict[str, int]  # the parameter that tensor parallelism cuts, and along which axis

    def __init__(self, linear: nn.Module, A: Tensor, rows: Tensor | None, config: LoRAConfig):
        super().__init__()
        out = linear.weight.shape[0] if rows is None else len(rows)
        self.A = nn.Parameter(A.to(linear.weight).contiguous())  # a rank's part of it, too: AdamW's kernel takes weights as they lie
        self.B = nn.Parameter(torch.zeros(out, config.rank, dtype=linear.weight.dtype, device=linear.weight.device))
        self.register_buffer("rows", rows if rows is None else rows.to(linear.weight.device), persistent=False)
        self.scale, self.dropout, self.group = config.lora_alpha / config.rank, config.lora_dropout, linear.tp_group

    def forward(self, x: Tensor, output: Tensor, sequence_parallel: bool) -> Tensor:
        """`output` [S, B, rows] with the adapter's part added; `x` is what the layer read."""
        delta = self.scale * F.linear(self.between(F.linear(self._dropped(x, sequence_parallel), self.A), sequence_parallel), self.B)
        return output + delta if self.rows is None else output.index_add(-1, self.rows, delta)

    def between(self, hidden: Tensor, sequence_parallel: bool) -> Tensor:
        """From A's ranks to B's: [S, B, r]."""
        raise NotImplementedError

    def _dropped(self, x: Tensor, sequence_parallel: bool) -> Tensor:
        """Ranks that read the same must drop the same; those with parts of their own must not."""
        if not (self.training and self.dropout):
            return x
        with get_cuda_rng_tracker().fork() if sequence_parallel or self.reads_parts else nullcontext():
            return F.dropout(x, self.dropout)


class ColumnAdapter(Adapter):
    """Of a layer whose rows are cut."""

    reads_parts, cut = False, {"B": 0}

    def __init__(self, linear: ColumnLinear, *args):
        super().__init__(linear, *args)
        self.A.sequence_parallel = linear.sequence_parallel  # each rank's gradient is that of its part of the sequence
        set_tensor_model_parallel_attributes(self.B, True, 0, 1)

    def between(self, hidden, sequence_parallel):
        if sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.group)


class RowAdapter(Adapter):
    """Of a layer whose columns are cut."""

    reads_parts, cut = True, {"A": 1}

    def __init__(self, linear: RowLinear, *args):
        super().__init__(linear, *args)
        set_tensor_model_parallel_attributes(self.A, True, 1, 1)
        self.B.sequence_parallel = linear.sequence_parallel

    def between(self, hidden, sequence_parallel):
        if sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
        return reduce_from_tensor_model_parallel_region(hidden, group=self.group)


def adapt(model: HiddenStateGPTModel, config: LoRAConfig, *, seed: int) -> None:
    """Freeze the model, and give its layers adapters that change nothing yet: A as PEFT draws it, by the seed and the module's
    name alone, and B zero.

    Raises:
        UserError: a target is no linear module of the model, or cannot be cut so.
    """
    model.requires_grad_(False)
    model.adapted = config
    mappings, wanted = linear_mappings(model.hf_config), target_modules(model.hf_config, config.lora_target_modules)
    for layer in model.decoder.layers:
        for path, mapping in mappings.items():
            linear = layer.get_submodule(path)
            parts = {module: rows_here(model, linear, mapping, module) for module in modules_of(mapping) if module in wanted}
            if parts:
                name = lambda module, number=layer.layer_number - 1: f"{seed}/{module.replace('*', str(number))}"
                adapters = {leaf(module): new_adapter(model, linear, rows, config, name(module)) for module, rows in parts.items()}
                linear.adapters = nn.ModuleDict(adapters)


def new_adapter(model: HiddenStateGPTModel, linear: nn.Module, rows: Tensor | None, config: LoRAConfig, name: str) -> Adapter:
    """This rank's part of one."""
    A = initial_A(config.rank, linear.input_size, name)
    if isinstance(linear, ColumnLinear):
        return ColumnAdapter(linear, A, rows, config)
    return RowAdapter(linear, A.chunk(model.layout.tp_size, 1)[model.layout.tp_rank], rows, config)


def rows_here(model: HiddenStateGPTModel, linear: nn.Module, mapping: Mapping, module: str) -> Tensor | None:
    """`own_rows` on this rank; a row-parallel layer has all."""
    if not isinstance(linear, ColumnLinear):
        return None
    return own_rows(mapping, module, model.hf_config, model.layout.tp_rank, model.layout.tp_size)


def initial_A(rank: int, columns: int, name: str) -> Tensor:
    """[rank, columns], uniform within ± 1 / √columns: PEFT's kaiming_uniform_(a=√5)."""
    generator = torch.Generator().manual_seed(random.Random(name).getrandbits(63))
    return torch.empty(rank, columns).uniform_(-1, 1, generator=generator) / math.sqrt(columns)


def merged_weight(linear: Adapted) -> Tensor:
    """This rank's part of W + (α / r) B A, summed in float32, in W's dtype: what the layer has when its adapters are merged."""
    total = linear.weight.float()
    for adapter in linear.adapters.values():
        delta = adapter.scale * (adapter.B.float() @ adapter.A.float())
        total = total + delta if adapter.rows is None else total.index_add(0, adapter.rows, delta)
    return total.to(linear.weight.dtype)


# ---- which rows of a layer are a Hugging Face module's


class RowNumbers:
    """A Source whose tensors of one module hold the numbers of its rows, and all others -1."""

    def __init__(self, module: str, shapes: dict[str, Shape], transposed: bool):
        self.module, self.shapes, self.transposed = module, shapes, transposed

    def shape(self, name: str) -> Shape:
        """One column a tensor."""
        rows = self.shapes[name][1 if self.transposed else 0]
        return (1, rows) if self.transposed else (rows, 1)

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """As Hugging Face would store it."""
        numbers = torch.arange(max(self.shape(name))) if name == f"{self.module}.weight" else torch.full((max(self.shape(name)),), -1)
        return numbers.view(self.shape(name))[index]


def hf_rows(mapping: Mapping, module: str, hf: PretrainedConfig, tp_rank: int = 0, tp_size: int = 1) -> Tensor:
    """For each row of the rank's part of a layer, the number of the module's row that it is, or -1."""
    numbers = RowNumbers(module, hf_shapes(family_of(hf), hf), mapping.sources()[0].transposed)
    return mapping.read_shard(numbers, tp_rank, tp_size)[:, 0]


def own_rows(mapping: Mapping, module: str, hf: PretrainedConfig, tp_rank: int, tp_size: int) -> Tensor | None:
    """The module's rows of the rank's part; None: all of them.

    Raises:
        UserError: ranks that share a key/value head would have unequal parts.
    """
    numbers = hf_rows(mapping, module, hf, tp_rank, tp_size)
    rows = (numbers >= 0).nonzero()[:, 0]
    whole = int((hf_rows(mapping, module, hf) >= 0).sum())
    if len(rows) * tp_size != whole:
        groups = hf.num_key_value_heads
        raise UserError(
            f"--lora-target-modules {leaf(module)}: its {groups} key/value heads cannot be shared by {tp_size} ranks; use "
            f"--tensor-model-parallel-size {groups} or fewer, or leave q_proj, k_proj and v_proj out"
        )
    return None if len(rows) == len(numbers) else rows


# ---- names, of which `*` is the layer's number


def target_modules(hf: PretrainedConfig, targets: tuple[str, ...]) -> set[str]:
    """The Hugging Face modules that get an adapter, in every layer; none given: PEFT's default for the family.

    Raises:
        UserError: a target that is none of them.
    """
    every = [module for mapping in linear_mappings(hf).values() for module in modules_of(mapping)]
    known = ", ".join(sorted({leaf(module) for module in every}))
    if targets == (ALL_LINEAR,):
        if bare := next((part for part in WITHOUT for name in family_of(hf).table(hf, hf.vocab_size) if part in name), None):
            what = f"{bare} of this {hf.model_type} model has no adapters here"
            raise UserError(f"--lora-target-modules {ALL_LINEAR}: {what}; use some of {known}")
        return set(every)
    found: set[str] = set()
    for target in targets or DEFAULT_TARGETS.get(hf.model_type, USUAL_TARGETS):
        matches = {module for module in every if f".{module}".endswith(f".{target}")}
        if not matches:
            raise UserError(
                f"--lora-target-modules {target}: no linear module of this {hf.model_type} model; use some of {known}, or {ALL_LINEAR}"
            )
        found |= matches
    return found


def linear_mappings(hf: PretrainedConfig) -> dict[str, Mapping]:
    """Of the weights of a layer's linear layers, by their path in the layer."""
    table = family_of(hf).table(hf, hf.vocab_size)
    names = {path: f"decoder.layers.*.{path}.weight" for path in LINEARS}
    return {path: table[name] for path, name in names.items() if name in table}


def modules_of(mapping: Mapping) -> list[str]:
    """The Hugging Face modules that a linear layer is made of."""
    return list(dict.fromkeys(tensor.name.removesuffix(".weight") for tensor in mapping.sources()))


def leaf(module: str) -> str:
    """q_proj of model.layers.*.self_attn.q_proj."""
    return module.rpartition(".")[2]
