"""Mistral: Llama without biases, whose attention reaches back over a window."""

from __future__ import annotations

from functools import partial

from transformers import MistralConfig

from megakd.models import llama
from megakd.models.family import Family


def transformer_config(hf: MistralConfig) -> dict:
    return llama.transformer_config(hf, bias=False) | llama.sliding(hf)


TABLE = partial(llama.table, attention_bias=False, mlp_bias=False)
FAMILY = Family("mistral", llama.unsupported, transformer_config, llama.model_arguments, TABLE, skipped_rows={})
