"""GPT-2: learned positions, LayerNorm, tanh-GELU, tied head; Conv1D weights are [in, out] and c_attn is [q | k | v]."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from transformers import GPT2Config

from megakd.models.family import Family, linear, norm
from megakd.models.param_mapping import QKV, HFTensor, Replicated, Table, Vocabulary

ACTIVATIONS = {"gelu_new": partial(F.gelu, approximate="tanh"), "gelu": F.gelu, "relu": F.relu}


def unsupported(hf: GPT2Config) -> str | None:
    if hf.activation_function not in ACTIVATIONS:
        return f"activation_function {hf.activation_function!r} is not one of {sorted(ACTIVATIONS)}; use a model that has one of them"
    if hf.scale_attn_by_inverse_layer_idx or hf.reorder_and_upcast_attn or not hf.scale_attn_weights:
        return "it scales attention in a way that only transformers' own GPT-2 knows; use one that scales by 1/√d"
    return None


def transformer_config(hf: GPT2Config) -> dict:
    return {
        "ffn_hidden_size": hf.n_inner or 4 * hf.n_embd,
        "activation_func": ACTIVATIONS[hf.activation_function],
        "normalization": "LayerNorm",
        "layernorm_epsilon": hf.layer_norm_epsilon,
        "hidden_dropout": hf.resid_pdrop,
        "attention_dropout": hf.attn_pdrop,
    }


def model_arguments(hf: GPT2Config) -> dict:
    return {"position_embedding_type": "learned_absolute", "max_sequence_length": hf.n_positions}


def _qkv(hf: GPT2Config, kind: str) -> QKV:
    name, transposed = f"transformer.h.*.attn.c_attn.{kind}", kind == "weight"
    q, k, v = (HFTensor(name, transposed, part, 3) for part in range(3))
    return QKV(q=q, k=k, v=v, groups=hf.n_head)


def table(hf: GPT2Config, padded_vocab_size: int) -> Table:
    words = HFTensor("transformer.wte.weight")
    head = words if hf.tie_word_embeddings else HFTensor("lm_head.weight")
    layer = "decoder.layers.*"
    return {
        "embedding.word_embeddings.weight": Vocabulary(tensor=words, padded_size=padded_vocab_size),
        "embedding.position_embeddings.weight": Replicated(tensor=HFTensor("transformer.wpe.weight")),
        **norm(f"{layer}.input_layernorm", "transformer.h.*.ln_1"),
        f"{layer}.self_attention.linear_qkv.weight": _qkv(hf, "weight"),
        f"{layer}.self_attention.linear_qkv.bias": _qkv(hf, "bias"),
        **linear(f"{layer}.self_attention.linear_proj", "transformer.h.*.attn.c_proj", axis=1, transposed=True),
        **norm(f"{layer}.pre_mlp_layernorm", "transformer.h.*.ln_2"),
        **linear(f"{layer}.mlp.linear_fc1", "transformer.h.*.mlp.c_fc", axis=0, transposed=True),
        **linear(f"{layer}.mlp.linear_fc2", "transformer.h.*.mlp.c_proj", axis=1, transposed=True),
        **norm("decoder.final_layernorm", "transformer.ln_f"),
        "output_layer.weight": Vocabulary(tensor=head, padded_size=padded_vocab_size),
    }


FAMILY = Family("gpt2", unsupported, transformer_config, model_arguments, table, skipped_rows={}, freezes_pad_input=False)
