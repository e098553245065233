"""Gemma 3, its text model: RMSNorm with weights 1 + w around both blocks and over queries and keys, scaled embeddings, GeGLU, tied head.

Most layers attend to a window and turn queries and keys by frequencies of their own; every sixth attends to everything.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec
from transformers import Gemma3TextConfig

from megakd.models import llama
from megakd.models.family import Family, norm
from megakd.models.layer_specs import Norm, with_attention, with_norms_behind
from megakd.models.param_mapping import Table
from megakd.models.transformer_layer import SandwichNormLayer

ACTIVATION = "gelu_pytorch_tanh"


def unsupported(hf: Gemma3TextConfig) -> str | None:
    if hf.hidden_activation != ACTIVATION:
        return f"hidden_activation {hf.hidden_activation!r} is not {ACTIVATION!r}; use a model of the family's own activation"
    if hf.attn_logit_softcapping or hf.final_logit_softcapping:
        return "it caps its scores or logits (attn_logit_softcapping, final_logit_softcapping), as Gemma 2 did; use one of Google's Gemma 3"
    if hf.use_bidirectional_attention:
        return "use_bidirectional_attention is true: it reads what comes later, and cannot write; use one that writes"
    if not hf.sliding_window:
        return "sliding_window is missing; give the config.json that the weights were saved with"
    return llama.unsupported_layers(hf)


def transformer_config(hf: Gemma3TextConfig) -> dict:
    own = {
        "activation_func": partial(F.gelu, approximate="tanh"),
        "layernorm_zero_centered_gamma": True,  # 1 + w
        "qk_layernorm": True,
        "softmax_scale": hf.query_pre_attn_scalar**-0.5,
    }
    return llama.transformer_config(hf, bias=hf.attention_bias) | llama.sliding(hf) | own


def model_arguments(hf: Gemma3TextConfig) -> dict:
    return llama.model_arguments(hf) | {"embedding_scale": hf.hidden_size**0.5}


def layer_spec(hf: Gemma3TextConfig) -> ModuleSpec:
    """Norms before and behind attention and MLP, and of queries and keys."""
    attention = with_attention(q_layernorm=Norm, k_layernorm=Norm).submodules.self_attention
    return with_norms_behind(SandwichNormLayer, self_attention=attention, post_self_attn_layernorm=Norm, post_mlp_layernorm=Norm)


def table(hf: Gemma3TextConfig, padded_vocab_size: int) -> Table:
    layer, theirs = "decoder.layers.*", "model.layers.*"
    return {
        **llama.table(hf, padded_vocab_size, attention_bias=hf.attention_bias, mlp_bias=False),
        **llama.qk_norms(),
        **norm(f"{layer}.post_self_attn_layernorm", f"{theirs}.post_attention_layernorm", bias=False),
        **norm(f"{layer}.pre_mlp_layernorm", f"{theirs}.pre_feedforward_layernorm", bias=False),
        **norm(f"{layer}.post_mlp_layernorm", f"{theirs}.post_feedforward_layernorm", bias=False),
    }


FAMILY = Family("gemma3_text", unsupported, transformer_config, model_arguments, table, skipped_rows={}, layer_spec=layer_spec)
