"""Tiny random Hugging Face models of each family, with random biases and norms so that every name of the table is really checked."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)
from transformers.utils import logging

logging.disable_progress_bar()

LLAMAS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "mistral": MistralConfig,
    "smollm3": SmolLM3Config,
    "gemma3_text": Gemma3TextConfig,
}
OWN = {  # what is not as in Llama, or would not be tiny
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 48, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "smollm3": {"pad_token_id": None},
    "gemma3_text": {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 5, "sliding_window_pattern": 2, "tie_word_embeddings": True},
}
VOCABULARY = 97  # prime: every tensor-parallel size needs padding
SPECIALS = {"bos_token_id": 0, "eos_token_id": 0}


def tiny_config(family: str, *, layers: int = 4, hidden: int = 64, vocab_size: int = VOCABULARY, **overrides) -> PretrainedConfig:
    """No dropout, 4 heads, 64 positions; Llama has 2 key/value heads and its own head."""
    if family == "gpt2":
        fields = {
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
        return GPT2Config(**{"vocab_size": vocab_size, **SPECIALS, **fields, **overrides})
    fields = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 4, "max_position_embeddings": 64}
    if family == "opt":
        fields |= {
            "ffn_dim": 2 * hidden,
            "word_embed_proj_dim": hidden,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "pad_token_id": 1,
        }
        return OPTConfig(**{"vocab_size": vocab_size, **SPECIALS, **fields, **overrides})
    fields |= {"intermediate_size": 112, "num_key_value_heads": 2, "tie_word_embeddings": False}
    return LLAMAS[family](**{"vocab_size": vocab_size, **SPECIALS, **fields, **OWN.get(family, {}), **overrides})


def tiny_model(config: PretrainedConfig, *, seed: int = 7):
    """A transformers model in float32, in evaluation mode."""
    torch.manual_seed(seed)
    eager = {f"{part}_implementation": "eager" for part in ("attn", "experts") if part == "attn" or hasattr(config, "num_experts")}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **eager)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.05)
    return model.eval()


def tiny_folder(path: Path, family: str, *, seed: int = 7, **config) -> Path:
    """A saved tiny model."""
    tiny_model(tiny_config(family, **config), seed=seed).save_pretrained(path)
    return path
