"""Qwen2 and Qwen2.5: Llama with biases on q, k and v alone; small ones tie their head. Late layers may slide."""

from __future__ import annotations

from functools import partial

from transformers import Qwen2Config

from megakd.models import llama
from megakd.models.family import Family


def transformer_config(hf: Qwen2Config) -> dict:
    return llama.transformer_config(hf, bias=False) | llama.sliding(hf) | {"add_qkv_bias": True}


TABLE = partial(llama.table, attention_bias=False, qkv_bias=True, mlp_bias=False)
FAMILY = Family("qwen2", llama.unsupported, transformer_config, llama.model_arguments, TABLE, skipped_rows={})
