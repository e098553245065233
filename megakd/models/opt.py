"""OPT: learned positions that begin at row 2 of their table, LayerNorm before each block, ReLU, tied head.

OPT-350m has its norms behind each block and none at the end, and words narrower than its layers.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from transformers import OPTConfig

from megakd.models.family import Family, linear, norm
from megakd.models.layer_specs import LAYER, Norm, with_norms_behind
from megakd.models.param_mapping import QKV, HFTensor, Replicated, Table, Vocabulary
from megakd.models.transformer_layer import PostNormLayer

POSITIONS = "model.decoder.embed_positions.weight"
UNUSED_POSITIONS = 2  # Hugging Face keeps two rows before position 0
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}
POST_NORM = with_norms_behind(
    PostNormLayer, input_layernorm=IdentityOp, pre_mlp_layernorm=IdentityOp, post_self_attn_layernorm=Norm, post_mlp_layernorm=Norm
)


def unsupported(hf: OPTConfig) -> str | None:
    if hf.activation_function not in ACTIVATIONS:
        return f"activation_function {hf.activation_function!r} is not one of {sorted(ACTIVATIONS)}; use a model that has one of them"
    return None


def layer_spec(hf: OPTConfig) -> ModuleSpec:
    """The common one, or 350m's."""
    return LAYER if hf.do_layer_norm_before else POST_NORM


def final_norm(hf: OPTConfig) -> bool:
    """Not where every layer ends with one."""
    return hf.do_layer_norm_before and not hf._remove_final_layer_norm


def transformer_config(hf: OPTConfig) -> dict:
    return {
        "ffn_hidden_size": hf.ffn_dim,
        "activation_func": ACTIVATIONS[hf.activation_function],
        "normalization": "LayerNorm",
        "layernorm_epsilon": 1e-5,
        "add_bias_linear": hf.enable_bias,
        "hidden_dropout": hf.dropout,
        "attention_dropout": hf.attention_dropout,
    }


def model_arguments(hf: OPTConfig) -> dict:
    return {
        "position_embedding_type": "learned_absolute",
        "max_sequence_length": hf.max_position_embeddings,
        "embedding_size": hf.word_embed_proj_dim,
    }


def _qkv(hf: OPTConfig, kind: str) -> QKV:
    q, k, v = (HFTensor(f"model.decoder.layers.*.self_attn.{x}_proj.{kind}") for x in "qkv")
    return QKV(q=q, k=k, v=v, groups=hf.num_attention_heads)


def _around(hf: OPTConfig) -> Table:
    """What stands around the layers in some sizes alone: projections of narrow words, and no final norm where layers end with one."""
    projected = hf.word_embed_proj_dim != hf.hidden_size
    around = {f"{x}.weight": Replicated(tensor=HFTensor(f"model.decoder.{x}.weight")) for x in ("project_in", "project_out") if projected}
    return around | (norm("decoder.final_layernorm", "model.decoder.final_layer_norm") if final_norm(hf) else {})


def _named(table: Table, hf: OPTConfig) -> Table:
    """Without the biases and the norms' weights that a config leaves out (Galactica's)."""
    is_norm = lambda name: "layernorm" in name
    left_out = lambda name: not hf.layer_norm_elementwise_affine if is_norm(name) else name.endswith("bias") and not hf.enable_bias
    return {name: mapping for name, mapping in table.items() if not left_out(name)}


def table(hf: OPTConfig, padded_vocab_size: int) -> Table:
    words = HFTensor("model.decoder.embed_tokens.weight")
    head = words if hf.tie_word_embeddings else HFTensor("lm_head.weight")
    layer, hf_layer = "decoder.layers.*", "model.decoder.layers.*"
    norms = ("input_layernorm", "pre_mlp_layernorm") if hf.do_layer_norm_before else ("post_self_attn_layernorm", "post_mlp_layernorm")
    whole = {
        "embedding.word_embeddings.weight": Vocabulary(tensor=words, padded_size=padded_vocab_size),
        "embedding.position_embeddings.weight": Replicated(tensor=HFTensor(POSITIONS, skip_rows=UNUSED_POSITIONS)),
        **norm(f"{layer}.{norms[0]}", f"{hf_layer}.self_attn_layer_norm"),
        f"{layer}.self_attention.linear_qkv.weight": _qkv(hf, "weight"),
        f"{layer}.self_attention.linear_qkv.bias": _qkv(hf, "bias"),
        **linear(f"{layer}.self_attention.linear_proj", f"{hf_layer}.self_attn.out_proj", axis=1),
        **norm(f"{layer}.{norms[1]}", f"{hf_layer}.final_layer_norm"),
        **linear(f"{layer}.mlp.linear_fc1", f"{hf_layer}.fc1", axis=0),
        **linear(f"{layer}.mlp.linear_fc2", f"{hf_layer}.fc2", axis=1),
        **_around(hf),
        "output_layer.weight": Vocabulary(tensor=head, padded_size=padded_vocab_size),
    }
    return _named(whole, hf)


FAMILY = Family(
    "opt", unsupported, transformer_config, model_arguments, table, skipped_rows={POSITIONS: UNUSED_POSITIONS}, layer_spec=layer_spec,
    final_norm=final_norm,
)  # fmt: skip
