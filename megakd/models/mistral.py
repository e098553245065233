"""Mistral: Llama without biases. Attention reaches back over a window; within it, it is full attention, and that is where we stay."""

from __future__ import annotations

from functools import partial

from transformers import MistralConfig

from megakd.models import llama
from megakd.models.family import Family

TABLE = partial(llama.table, attention_bias=False, mlp_bias=False)
CONFIG = partial(llama.transformer_config, bias=False)


def model_arguments(hf: MistralConfig) -> dict:
    positions = min(hf.max_position_embeddings, hf.sliding_window or hf.max_position_embeddings)
    return {"position_embedding_type": "rope", "max_sequence_length": positions}


FAMILY = Family("mistral", llama.unsupported, CONFIG, model_arguments, TABLE, skipped_rows={})
