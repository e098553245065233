"""Qwen2 and Qwen2.5: Llama with biases on q, k and v alone; small ones tie their head."""

from __future__ import annotations

from functools import partial

from transformers import Qwen2Config

from megakd.models import llama
from megakd.models.family import Family


def unsupported(hf: Qwen2Config) -> str | None:
    if hf.use_sliding_window:
        return "use_sliding_window is true; use one that attends to its whole context"
    return llama.unsupported(hf)


def transformer_config(hf: Qwen2Config) -> dict:
    return llama.transformer_config(hf, bias=False) | {"add_qkv_bias": True}


TABLE = partial(llama.table, attention_bias=False, qkv_bias=True, mlp_bias=False)
FAMILY = Family("qwen2", unsupported, transformer_config, llama.model_arguments, TABLE, skipped_rows={})
