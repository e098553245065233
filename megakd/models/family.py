"""What a model family is: how its Hugging Face config becomes a TransformerConfig and layers, and its name table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from transformers import PretrainedConfig

from megakd.models.layer_specs import LAYER
from megakd.models.param_mapping import HFTensor, Replicated, Sharded, Table


@dataclass(frozen=True)
class Family:
    """A family is one page, such as gpt2.py; Qwen2 and Mistral are Llama's but for a few lines."""

    model_type: str
    unsupported: Callable[[PretrainedConfig], str | None]  # why a config of this family cannot be run and the way out, or None
    transformer_config: Callable[[PretrainedConfig], dict[str, Any]]  # arguments of megatron's TransformerConfig
    model_arguments: Callable[[PretrainedConfig], dict[str, Any]]  # arguments of megatron's GPTModel
    table: Callable[[PretrainedConfig, int], Table]  # (config, padded vocabulary size) -> names and mappings
    skipped_rows: dict[str, int]  # Hugging Face tensors with leading rows that no Megatron parameter holds
    layer_spec: Callable[[PretrainedConfig], ModuleSpec] = lambda _: LAYER  # the modules of a layer, in training as in decoding
    final_norm: Callable[[PretrainedConfig], bool] = lambda _: True  # whether one stands behind the last layer
    freezes_pad_input: bool = True  # transformers gives nn.Embedding `padding_idx`, the config's pad_token_id

    def padding_idx(self, hf: PretrainedConfig) -> int | None:
        """The id whose row of the embedding gets no gradient from the input in transformers; a negative one counts from the end."""
        if not self.freezes_pad_input or hf.pad_token_id is None:
            return None
        return hf.pad_token_id % hf.vocab_size


def linear(megatron: str, hf: str, *, axis: int, transposed: bool = False, bias: bool = True) -> Table:
    """A column-parallel (axis 0) or row-parallel (axis 1) layer; a row-parallel bias is whole on every rank."""
    weight = {f"{megatron}.weight": Sharded(tensor=HFTensor(f"{hf}.weight", transposed), axis=axis)}
    if not bias:
        return weight
    kind = Sharded if axis == 0 else Replicated
    return weight | {f"{megatron}.bias": kind(tensor=HFTensor(f"{hf}.bias"))}


def norm(megatron: str, hf: str, *, bias: bool = True) -> Table:
    """A LayerNorm, or an RMSNorm without bias."""
    parts = ("weight", "bias") if bias else ("weight",)
    return {f"{megatron}.{part}": Replicated(tensor=HFTensor(f"{hf}.{part}")) for part in parts}
