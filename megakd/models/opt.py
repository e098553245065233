"""OPT: learned positions that begin at row 2 of their table, LayerNorm before each block, ReLU, tied head."""

from __future__ import annotations

import torch.nn.functional as F
from transformers import OPTConfig

from megakd.models.family import Family, linear, norm
from megakd.models.param_mapping import QKV, HFTensor, Replicated, Table, Vocabulary

POSITIONS = "model.decoder.embed_positions.weight"
UNUSED_POSITIONS = 2  # Hugging Face keeps two rows before position 0
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


def unsupported(hf: OPTConfig) -> str | None:
    if (width := hf.word_embed_proj_dim) != hf.hidden_size:
        return (
            f"word_embed_proj_dim {width} differs from hidden_size {hf.hidden_size}: it projects its embeddings (OPT-350m does); "
            "use another size of OPT"
        )
    if not hf.do_layer_norm_before:
        return "do_layer_norm_before is false: it normalises after each block (OPT-350m does); use another size of OPT"
    if getattr(hf, "_remove_final_layer_norm", False) or not hf.enable_bias or not hf.layer_norm_elementwise_affine:
        return "it has no final layer norm, no biases or no affine norms; use a model like Meta's own"
    if hf.activation_function not in ACTIVATIONS:
        return f"activation_function {hf.activation_function!r} is not one of {sorted(ACTIVATIONS)}; use a model that has one of them"
    return None


def transformer_config(hf: OPTConfig) -> dict:
    return {
        "ffn_hidden_size": hf.ffn_dim,
        "activation_func": ACTIVATIONS[hf.activation_function],
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": hf.dropout,
        "attention_dropout": hf.attention_dropout,
    }


def model_arguments(hf: OPTConfig) -> dict:
    return {"position_embedding_type": "learned_absolute", "max_sequence_length": hf.max_position_embeddings}


def _qkv(hf: OPTConfig, kind: str) -> QKV:
    q, k, v = (HFTensor(f"model.decoder.layers.*.self_attn.{x}_proj.{kind}") for x in "qkv")
    return QKV(q=q, k=k, v=v, groups=hf.num_attention_heads)


def table(hf: OPTConfig, padded_vocab_size: int) -> Table:
    words = HFTensor("model.decoder.embed_tokens.weight")
    head = words if hf.tie_word_embeddings else HFTensor("lm_head.weight")
    layer, hf_layer = "decoder.layers.*", "model.decoder.layers.*"
    return {
        "embedding.word_embeddings.weight": Vocabulary(tensor=words, padded_size=padded_vocab_size),
        "embedding.position_embeddings.weight": Replicated(tensor=HFTensor(POSITIONS, skip_rows=UNUSED_POSITIONS)),
        **norm(f"{layer}.input_layernorm", f"{hf_layer}.self_attn_layer_norm"),
        f"{layer}.self_attention.linear_qkv.weight": _qkv(hf, "weight"),
        f"{layer}.self_attention.linear_qkv.bias": _qkv(hf, "bias"),
        **linear(f"{layer}.self_attention.linear_proj", f"{hf_layer}.self_attn.out_proj", axis=1),
        **norm(f"{layer}.pre_mlp_layernorm", f"{hf_layer}.final_layer_norm"),
        **linear(f"{layer}.mlp.linear_fc1", f"{hf_layer}.fc1", axis=0),
        **linear(f"{layer}.mlp.linear_fc2", f"{hf_layer}.fc2", axis=1),
        **norm("decoder.final_layernorm", "model.decoder.final_layer_norm"),
        "output_layer.weight": Vocabulary(tensor=head, padded_size=padded_vocab_size),
    }


FAMILY = Family("opt", unsupported, transformer_config, model_arguments, table, skipped_rows={POSITIONS: UNUSED_POSITIONS})
