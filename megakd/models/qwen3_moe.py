"""Qwen3-MoE: Qwen3 with a sparse MLP in every layer."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from transformers import Qwen3MoeConfig

from megakd.models import llama, qwen3
from megakd.models.family import Family, linear
from megakd.models.param_mapping import GatedMLP, HFTensor, Replicated, Table
from megakd.models.sparse_mlp import Routing, SparseLayer


def unsupported(hf: Qwen3MoeConfig) -> str | None:
    if hf.mlp_only_layers or hf.decoder_sparse_step != 1:
        return "some of its layers are dense (mlp_only_layers, decoder_sparse_step); use one that is sparse throughout"
    return llama.unsupported(hf)


def transformer_config(hf: Qwen3MoeConfig) -> dict:
    return qwen3.transformer_config(hf) | {"ffn_hidden_size": hf.moe_intermediate_size}


def layer_spec(hf: Qwen3MoeConfig) -> ModuleSpec:
    """Qwen3's, sparse."""
    dense = qwen3.layer_spec(hf)
    routing = Routing(experts=hf.num_experts, chosen=hf.num_experts_per_tok, normalised=hf.norm_topk_prob)
    return ModuleSpec(module=SparseLayer, params={"routing": routing}, submodules=replace(dense.submodules, mlp=IdentityOp))


def table(hf: Qwen3MoeConfig, padded_vocab_size: int) -> Table:
    mlp, theirs = "decoder.layers.*.mlp", "model.layers.*.mlp"
    found = {name: mapping for name, mapping in qwen3.table(hf, padded_vocab_size).items() if not name.startswith(mlp)}
    found[f"{mlp}.router.weight"] = Replicated(tensor=HFTensor(f"{theirs}.gate.weight"))
    for expert in range(hf.num_experts):
        gate, up = (HFTensor(f"{theirs}.experts.{expert}.{x}_proj.weight") for x in ("gate", "up"))
        found[f"{mlp}.experts.{expert}.linear_fc1.weight"] = GatedMLP(gate=gate, up=up)
        found |= linear(f"{mlp}.experts.{expert}.linear_fc2", f"{theirs}.experts.{expert}.down_proj", axis=1, bias=False)
    return found


FAMILY = Family("qwen3_moe", unsupported, transformer_config, llama.model_arguments, table, skipped_rows={}, layer_spec=layer_spec)
