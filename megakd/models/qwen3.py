"""Qwen3, dense: Llama with an RMSNorm over each query's and key's own channels, before they are turned; small ones tie their head."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec
from transformers import Qwen3Config

from megakd.models import llama
from megakd.models.family import Family
from megakd.models.layer_specs import Norm, with_attention
from megakd.models.param_mapping import Table


def transformer_config(hf: Qwen3Config) -> dict:
    qk_norms = {"qk_layernorm": True}  # so that their gradients are summed over heads' ranks
    return llama.transformer_config(hf, bias=hf.attention_bias) | llama.sliding(hf) | qk_norms


def layer_spec(hf: Qwen3Config) -> ModuleSpec:
    """Llama's, with norms of queries and keys."""
    return with_attention(q_layernorm=Norm, k_layernorm=Norm)


def table(hf: Qwen3Config, padded_vocab_size: int) -> Table:
    return llama.table(hf, padded_vocab_size, attention_bias=hf.attention_bias, mlp_bias=False) | llama.qk_norms()


FAMILY = Family("qwen3", llama.unsupported, transformer_config, llama.model_arguments, table, skipped_rows={}, layer_spec=layer_spec)
