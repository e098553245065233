"""From a Hugging Face config to this rank's stage, and from a Hugging Face folder to its weights: each rank reads only its slice."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from transformers import PretrainedConfig

from megakd.errors import UserError
from megakd.models import gemma3, gpt2, llama, mistral, opt, qwen2, qwen3, qwen3_moe, smollm3
from megakd.models.decoding import check_layers
from megakd.models.family import Family
from megakd.models.gpt_model import METHOD_PARTS, HiddenStateGPTModel
from megakd.models.layer_specs import block_spec
from megakd.models.param_mapping import HFTensor, Mapping, Source, Table
from megakd.models.rope import ropes_of
from megakd.runtime.parallel_layout import ParallelLayout

FAMILIES = {module.FAMILY.model_type: module.FAMILY for module in (gpt2, opt, llama, qwen2, qwen3, qwen3_moe, mistral, smollm3, gemma3)}
INSTEAD = {
    "gemma3": "it reads images too; save its text model with transformers' Gemma3ForCausalLM.from_pretrained(FOLDER, "
    "config=AutoConfig.from_pretrained(FOLDER).text_config, key_mapping={'^language_model.model': 'model'})"
    ".save_pretrained(NEW, save_original_format=False)"
}
VOCABULARY_MULTIPLE = (
    64  # rows of the output layer per rank: keeps its matrix products aligned (50,257 becomes 50,304 at TP 1 and 2)
)


def family_of(hf: PretrainedConfig, *, flag: str = "--model", name: str = "") -> Family:
    """The family of a config.

    Raises:
        UserError: an unknown family, or a config of a known one that cannot be run; the message says why.
    """
    family = FAMILIES.get(hf.model_type)
    if family is None:
        way_out = INSTEAD.get(hf.model_type, f"use one of {', '.join(sorted(FAMILIES))}")
        raise UserError(f"{flag} {name}: model_type {hf.model_type!r} is not supported; {way_out}")
    if reason := family.unsupported(hf):
        raise UserError(f"{flag} {name}: this {hf.model_type} model cannot be run: {reason}")
    return family


def divisible(hf: PretrainedConfig, **options: str) -> tuple[int, int, int]:
    """What tensor parallelism divides: attention heads, key/value heads, feed-forward columns."""
    heads = hf.num_attention_heads
    return heads, getattr(hf, "num_key_value_heads", None) or heads, family_of(hf, **options).transformer_config(hf)["ffn_hidden_size"]


def tensor_parallel_sizes(hf: PretrainedConfig) -> list[int]:
    """Those that fit the model."""
    heads, groups, ffn = divisible(hf)
    return [t for t in range(1, heads + 1) if heads % t == 0 and ffn % t == 0 and (groups % t == 0 or t % groups == 0)]


def check_layout(hf: PretrainedConfig, tp: int, pp: int, *, flag: str = "--model", name: str = "", prefix: str = "--") -> None:
    """Refuse a layout that does not fit the model; `name` and `flag` say which one it is, `prefix` what its layout's flags begin with.

    Raises:
        UserError: TP or PP does not fit; the message lists the sizes that do.
    """
    heads, groups, ffn = divisible(hf, flag=flag, name=name)
    if tp not in (fits := tensor_parallel_sizes(hf)):
        raise UserError(
            f"{prefix}tensor-model-parallel-size {tp} does not divide the {heads} attention heads, {groups} key/value heads and "
            f"{ffn} feed-forward columns of {flag} {name}; use one of {fits}"
        )
    if pp > hf.num_hidden_layers:
        raise UserError(
            f"{prefix}pipeline-model-parallel-size {pp} is more than the {hf.num_hidden_layers} layers of {flag} {name}; "
            f"use {hf.num_hidden_layers} or fewer"
        )


def context_length(hf: PretrainedConfig) -> int:
    """Positions that the model can be given."""
    return family_of(hf).model_arguments(hf)["max_sequence_length"]


def uneven_split(layers: int, pp: int) -> dict[str, int]:
    """megatron's arguments for layers that do not divide by the stages, none where they do.

    Stages in the middle are equal; the first and the last, which hold the embedding and the head as well, share what is left.
    """
    if layers % pp == 0:
        return {}
    middle = math.ceil(layers / pp)
    if layers - middle * (pp - 2) < 2:
        middle -= 1
    ends = layers - middle * (pp - 2)
    return {"num_layers_in_first_pipeline_stage": ends - ends // 2, "num_layers_in_last_pipeline_stage": ends // 2}


def padded_vocab_size(vocab_sizes: list[int], tp: int) -> int:
    """One padded width for all models of a run, so that their vocabulary shards hold the same token ids on every rank."""
    multiple = VOCABULARY_MULTIPLE * tp
    return math.ceil(max(vocab_sizes) / multiple) * multiple


def build_model(
    hf: PretrainedConfig,
    layout: ParallelLayout,
    *,
    padded_vocab_size: int,
    real_vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    **overrides,
) -> HiddenStateGPTModel:
    """This rank's stage with random weights.

    Args:
        real_vocab_size: ids that count, where they are fewer than the model's own.
        overrides: TransformerConfig fields (dropout, recompute, gradient accumulation).
    """
    family = family_of(hf)
    config, arguments = transformer_config(hf, family, layout, dtype, sequence_parallel, overrides), family.model_arguments(hf)
    model = HiddenStateGPTModel(
        config,
        block_spec(family.layer_spec(hf), config, layout.pp_rank, final_norm=family.final_norm(hf)),
        layout=layout,
        real_vocab_size=real_vocab_size or hf.vocab_size,
        padded_vocab_size=padded_vocab_size,
        padding_idx=family.padding_idx(hf),
        ropes=ropes_of(hf) if arguments["position_embedding_type"] == "rope" else (),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        **arguments,
    ).to(device=torch.cuda.current_device(), dtype=dtype)
    check_layers(model)
    model.hf_config = hf
    take_away(model, family.table(hf, padded_vocab_size))
    return model


def take_away(model: HiddenStateGPTModel, table: Table) -> None:
    """Biases, and weights of norms, that the table does not name: megatron has one flag for all biases, and none for such norms."""
    for name, _ in list(model.named_parameters()):
        if layer_pattern(name)[0] not in table:
            module, _, kind = name.rpartition(".")
            assert kind == "bias" or module.endswith("norm"), f"{name} is in no table"
            model.get_submodule(module).register_parameter(kind, None)


def transformer_config(
    hf, family: Family, layout: ParallelLayout, dtype, sequence_parallel: bool, overrides: dict
) -> TransformerConfig:
    """What is the same for every family; fields that a family or an override also names are theirs."""
    common = {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "num_attention_heads": hf.num_attention_heads,
        "tensor_model_parallel_size": layout.tp_size,
        "pipeline_model_parallel_size": layout.pp_size,
        "sequence_parallel": sequence_parallel and layout.tp_size > 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "deterministic_mode": torch.are_deterministic_algorithms_enabled(),  # of the embedding's gradient
        "calculate_per_token_loss": True,  # sums travel, the mean is taken once over the global batch
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "batch_p2p_comm": layout.device.type == "cuda",  # over the stages' own NCCL communicator, not one for each pair
        "batch_p2p_sync": False,
        **uneven_split(hf.num_hidden_layers, layout.pp_size),
    }
    return TransformerConfig(**common | family.transformer_config(hf) | overrides)


def parameter_mappings(model: HiddenStateGPTModel) -> Iterator[tuple[torch.nn.Parameter, Mapping]]:
    """This rank's parameters with their mappings at the model's own layer numbers; a method's own parts and adapters have none."""
    family = family_of(model.hf_config)
    table = family.table(model.hf_config, model.vocab_size)
    offset = get_transformer_layer_offset(model.config, pp_rank=model.layout.pp_rank)
    for name, param in model.named_parameters():
        if name.startswith(METHOD_PARTS) or ".adapters." in name:
            continue
        pattern, layer = layer_pattern(name)
        yield param, table[pattern] if layer is None else at_layer(table[pattern], layer + offset)


def layer_pattern(name: str) -> tuple[str, int | None]:
    """`decoder.layers.3.mlp.x` -> (`decoder.layers.*.mlp.x`, 3); other names -> (name, None)."""
    parts = name.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return name, None
    return ".".join([*parts[:2], "*", *parts[3:]]), int(parts[2])


def at_layer(mapping: Mapping, layer: int) -> Mapping:
    """The mapping with `*` filled in."""
    filled = {key: value.at_layer(layer) for key, value in vars(mapping).items() if isinstance(value, HFTensor)}
    return type(mapping)(**vars(mapping) | filled)


@torch.no_grad()
def load_weights(model: HiddenStateGPTModel, source: Source) -> None:
    """Fill this rank's parameters, reading only this rank's slices.

    Raises:
        UserError: a tensor's shape is not what the config says, or it holds a NaN or an infinity.
    """
    layout = model.layout
    for param, mapping in parameter_mappings(model):
        shard = mapping.read_shard(source, layout.tp_rank, layout.tp_size)
        if shard.shape != param.shape:
            names = ", ".join(tensor.name for tensor in mapping.sources())
            raise UserError(
                f"{names}: gives a shard of shape {tuple(shard.shape)}, but config.json asks for {tuple(param.shape)}"
            )
        param.copy_(shard)
        if not_finite(param):
            raise UserError(f"{_diverged(mapping, source)} holds NaN or infinite values; give weights of before they diverged")


def not_finite(tensor: Tensor) -> bool:
    """Whether it holds a NaN or an infinity, in one pass that copies nothing."""
    return tensor.numel() > 0 and not all(end.isfinite() for end in tensor.aminmax())


def _diverged(mapping: Mapping, source: Source) -> str:
    """Which of a parameter's Hugging Face tensors, and where it lies."""
    names = dict.fromkeys(tensor.name for tensor in mapping.sources())
    whole = lambda name: source.read(name, tuple(slice(0, size) for size in source.shape(name)))
    name = next((name for name in names if not_finite(whole(name))), ", ".join(names))
    return f"{source.place(name)}: {name}"
