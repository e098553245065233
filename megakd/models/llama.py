"""Llama: rotary positions, scaled or not, RMSNorm, gated SiLU, grouped key/value heads, tied or untied head."""

from __future__ import annotations

import torch.nn.functional as F
from transformers import LlamaConfig, PretrainedConfig

from megakd.models.family import Family, linear, norm
from megakd.models.param_mapping import QKV, GatedMLP, HFTensor, Table, Vocabulary
from megakd.models.rope import KINDS, rope_parameters, stretched_context

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def unsupported(hf: PretrainedConfig) -> str | None:
    """What every family built like Llama must satisfy."""
    if hf.hidden_act != "silu":
        return f"hidden_act {hf.hidden_act!r} is not 'silu'; use a model of the family's own activation"
    return unsupported_layers(hf)


def unsupported_layers(hf: PretrainedConfig) -> str | None:
    """Of its layers and their positions."""
    kinds = {said.get("rope_type", "default") for said in rope_parameters(hf)}
    if strange := kinds - set(ROPE_TYPES):
        return f"rope_type {min(strange)!r} is not one of {', '.join(ROPE_TYPES)}; use a model whose context was not extended that way"
    if strange := set(getattr(hf, "layer_types", None) or ()) - set(KINDS):
        return f"layer_types names {min(strange)!r}, which is not one of {', '.join(KINDS)}; use a model of the family's own layers"
    return None


def transformer_config(hf: LlamaConfig, *, bias: bool | None = None) -> dict:
    """With `bias`, all of megatron's linear layers have one; those that the table does not name are taken away again."""
    return {
        "ffn_hidden_size": hf.intermediate_size,
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf.rms_norm_eps,
        "add_bias_linear": hf.attention_bias or hf.mlp_bias if bias is None else bias,
        "num_query_groups": hf.num_key_value_heads,
        "kv_channels": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "hidden_dropout": 0.0,
        "attention_dropout": hf.attention_dropout,
    }


def sliding(hf: PretrainedConfig) -> dict:
    """Fields of a TransformerConfig some of whose layers, or all, attend to a window; Hugging Face counts the token itself in it."""
    if not hf.sliding_window:
        return {}
    kinds = getattr(hf, "layer_types", None) or ["sliding_attention"] * hf.num_hidden_layers
    return {"window_size": (hf.sliding_window - 1, 0), "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds]}


def model_arguments(hf: LlamaConfig) -> dict:
    return {"position_embedding_type": "rope", "max_sequence_length": stretched_context(hf)}


def _qkv(hf: LlamaConfig, kind: str) -> QKV:
    q, k, v = (HFTensor(f"model.layers.*.self_attn.{x}_proj.{kind}") for x in "qkv")
    groups = hf.num_key_value_heads
    return QKV(q=q, k=k, v=v, groups=groups, heads_per_group=hf.num_attention_heads // groups)


def qk_norms() -> Table:
    """Those of queries and keys, in the families that have them."""
    attention, theirs = "decoder.layers.*.self_attention", "model.layers.*.self_attn"
    norms = [norm(f"{attention}.{x}_layernorm", f"{theirs}.{x}_norm", bias=False) for x in "qk"]
    return norms[0] | norms[1]


def _gated_mlp(kind: str) -> GatedMLP:
    return GatedMLP(gate=HFTensor(f"model.layers.*.mlp.gate_proj.{kind}"), up=HFTensor(f"model.layers.*.mlp.up_proj.{kind}"))


def table(
    hf: PretrainedConfig,
    padded_vocab_size: int,
    *,
    attention_bias: bool | None = None,
    qkv_bias: bool | None = None,
    mlp_bias: bool | None = None,
) -> Table:
    """Families that are Llama but for their biases say which they have; Llama's config says it itself."""
    attention_bias = hf.attention_bias if attention_bias is None else attention_bias
    mlp_bias = hf.mlp_bias if mlp_bias is None else mlp_bias
    qkv_kinds = ("weight", "bias") if (attention_bias if qkv_bias is None else qkv_bias) else ("weight",)
    words = HFTensor("model.embed_tokens.weight")
    head = words if hf.tie_word_embeddings else HFTensor("lm_head.weight")
    layer, mlp_kinds = "decoder.layers.*", ("weight", "bias") if mlp_bias else ("weight",)
    return {
        "embedding.word_embeddings.weight": Vocabulary(tensor=words, padded_size=padded_vocab_size),
        **norm(f"{layer}.input_layernorm", "model.layers.*.input_layernorm", bias=False),
        **{f"{layer}.self_attention.linear_qkv.{kind}": _qkv(hf, kind) for kind in qkv_kinds},
        **linear(f"{layer}.self_attention.linear_proj", "model.layers.*.self_attn.o_proj", axis=1, bias=attention_bias),
        **norm(f"{layer}.pre_mlp_layernorm", "model.layers.*.post_attention_layernorm", bias=False),
        **{f"{layer}.mlp.linear_fc1.{kind}": _gated_mlp(kind) for kind in mlp_kinds},
        **linear(f"{layer}.mlp.linear_fc2", "model.layers.*.mlp.down_proj", axis=1, bias=mlp_bias),
        **norm("decoder.final_layernorm", "model.norm", bias=False),
        "output_layer.weight": Vocabulary(tensor=head, padded_size=padded_vocab_size),
    }


FAMILY = Family("llama", unsupported, transformer_config, model_arguments, table, skipped_rows={})
