"""How large a model is on a rank, from its config alone: numbers of its parameters, of a token's activations, of a token's cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from transformers import PretrainedConfig

from megakd.models.model_provider import family_of, uneven_split
from megakd.models.shapes import megatron_shape

WORDS, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class StageSizes:
    """Of one pipeline stage on one tensor-parallel rank; all are counts of numbers."""

    parameters: int
    largest: int  # of the parameters
    linear: int  # those in layers' matrices, which adapters adapt and codes replace
    head: int  # of the output layer; 0 where it is another stage's
    layers: int
    activations: int  # what a token leaves for the backward pass, in all layers of the stage
    of_one_layer: int
    cache: int  # keys and values of a token


def stage_sizes(
    hf: PretrainedConfig, *, padded_vocab_size: int, tp: int, pp: int, stage: int, sequence_parallel: bool = False
) -> StageSizes:
    """The sizes of stage `stage` of `pp`."""
    family = family_of(hf)
    layers, table = layers_of(hf.num_hidden_layers, pp)[stage], family.table(hf, padded_vocab_size)
    shapes = shapes_of(hf, padded_vocab_size)
    count = {name: math.ceil(math.prod(shape) / (1 if table[name].axis is None else tp)) for name, shape in shapes.items()}
    ends = {name for name in count if "*" not in name and (stage == 0 if name.startswith("embedding") else stage == pp - 1)}
    if hf.tie_word_embeddings and stage == pp - 1:
        ends.add(WORDS)  # the head; a second copy where the embedding is on another stage
    here = {name: (layers if "*" in name else 1) * n for name, n in count.items() if "*" in name or name in ends}
    of_one_layer = layer_activations(hf, tp, sequence_parallel)
    groups, size = key_value_heads(hf)
    return StageSizes(
        parameters=sum(here.values()),
        largest=max(count[name] for name in here),
        linear=sum(n for name, n in here.items() if "*" in name and len(shapes[name]) == 2),
        head=count[WORDS] if stage == pp - 1 else 0,
        layers=layers,
        activations=layers * of_one_layer,
        of_one_layer=of_one_layer,
        cache=2 * layers * max(1, groups // tp) * size,
    )


def layers_of(layers: int, pp: int) -> list[int]:
    """How many each stage has."""
    uneven = uneven_split(layers, pp)
    if not uneven:
        return [layers // pp] * pp
    first, last = uneven["num_layers_in_first_pipeline_stage"], uneven["num_layers_in_last_pipeline_stage"]
    return [first, *[(layers - first - last) // (pp - 2)] * (pp - 2), last]


def key_value_heads(hf: PretrainedConfig) -> tuple[int, int]:
    """Their number, and the size of each."""
    config, heads = family_of(hf).transformer_config(hf), hf.num_attention_heads
    return config.get("num_query_groups", heads), config.get("kv_channels", hf.hidden_size // heads)


def layer_activations(hf: PretrainedConfig, tp: int, sequence_parallel: bool) -> int:
    """Numbers that a token leaves in one layer for the backward pass, as our layer of megatron's modules keeps them.

    A norm keeps what it reads and what it writes, an RMSNorm what is between them too. Attention keeps queries, keys and values, once more
    where they were turned by their position, and its output; the feed-forward network what its activation reads and writes: of relu the
    latter alone, of a gate both halves, their activation and their product, and one half in a copy.
    """
    config, hidden, heads = family_of(hf).transformer_config(hf), hf.hidden_size, hf.num_attention_heads
    (groups, size), ffn = key_value_heads(hf), config["ffn_hidden_size"]
    norms = (6 if config.get("normalization") == "RMSNorm" else 4) * hidden
    is_rotary = family_of(hf).model_arguments(hf)["position_embedding_type"] == "rope"
    attention = (2 * heads + 2 * groups) * size + (heads + groups) * size * is_rotary
    width = 5 if config.get("gated_linear_unit") else 1 if config["activation_func"] is F.relu else 2
    return norms // (tp if sequence_parallel else 1) + (attention + width * ffn) // tp


def parameter_count(hf: PretrainedConfig) -> int:
    """Of the whole model, a tied head counted once."""
    repeated = lambda name: hf.num_hidden_layers if "*" in name else 1
    return sum(repeated(name) * math.prod(shape) for name, shape in shapes_of(hf, hf.vocab_size).items())


def shapes_of(hf: PretrainedConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Of every parameter at TP 1, `*` for the layer; without a head where that is the embedding."""
    family = family_of(hf)
    names = (name for name in family.table(hf, vocab_size) if not (hf.tie_word_embeddings and name == HEAD))
    return {name: megatron_shape(name, family, hf, vocab_size) for name in names}
