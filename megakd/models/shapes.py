"""Which shape a config gives to every Megatron parameter, and through the family's table to every Hugging Face tensor."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from megakd.models.family import Family
from megakd.models.param_mapping import Mapping

Shape = tuple[int, ...]


def megatron_shape(name: str, family: Family, hf: PretrainedConfig, vocab_size: int) -> Shape:
    """Of the full parameter `name`, at TP 1 and in one layer; `vocab_size` is the padded one, or the real one."""
    config, hidden, heads = family.transformer_config(hf), hf.hidden_size, hf.num_attention_heads
    groups, size = config.get("num_query_groups", heads), config.get("kv_channels", hidden // heads)
    ffn, words = config["ffn_hidden_size"], head_size(family, hf)
    weights = {
        "word_embeddings": (vocab_size, words),
        "project_in": (hidden, words),
        "project_out": (words, hidden),
        "position_embeddings": (family.model_arguments(hf)["max_sequence_length"], hidden),
        "linear_qkv": ((heads + 2 * groups) * size, hidden),
        "linear_proj": (hidden, heads * size),
        "linear_fc1": (2 * ffn if config.get("gated_linear_unit") else ffn, hidden),
        "linear_fc2": (hidden, ffn),
        "router": (getattr(hf, "num_experts", 0), hidden),
        "output_layer": (vocab_size, words),
        "q_layernorm": (size,),
        "k_layernorm": (size,),
    }
    module, kind = name.split(".")[-2:]
    shape = weights.get(module, (hidden,))  # a norm
    return shape[:1] if kind == "bias" else shape


def head_size(family: Family, hf: PretrainedConfig) -> int:
    """Columns of the word embeddings and of the output layer, and so of the hidden states that it reads."""
    return family.model_arguments(hf).get("embedding_size", hf.hidden_size)


def hf_shapes(family: Family, hf: PretrainedConfig) -> dict[str, Shape]:
    """By Hugging Face name, `*` for the layer number; as Hugging Face stores it."""
    table = family.table(hf, hf.vocab_size)
    return {
        name: shape
        for parameter, mapping in table.items()
        for name, shape in _pieces(mapping, megatron_shape(parameter, family, hf, hf.vocab_size))
    }


def _pieces(mapping: Mapping, shape: Shape) -> list[tuple[str, Shape]]:
    """A parameter without data is taken apart as one with data is."""
    pieces = []
    for tensor, piece in mapping.to_hf(torch.empty(shape, device="meta")):
        rows, *columns = piece.shape
        stored = (rows * tensor.parts + tensor.skip_rows, *columns)
        pieces.append((tensor.name, stored[::-1] if tensor.transposed else stored))
    return pieces
