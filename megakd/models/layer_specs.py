"""The project's own layer spec for megatron-core's GPTModel: attention that decodes too, and a norm that works under sequence parallelism.

megatron-core's stock local spec refuses sequence parallelism and materialises the attention scores. Parameter names are those of
its Transformer Engine spec's map, so checkpoints move between the two. A family whose layers differ names its own (`Family.layer_spec`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from megakd.models.attention import SDPACoreAttention
from megakd.models.linear import ColumnLinear, RowLinear
from megakd.models.transformer_layer import NormsBehind, NormsBehindSubmodules, SelfAttention, TransformerLayer


class Norm:
    """torch's LayerNorm or RMSNorm whose parameters carry `sequence_parallel`: all that megatron's gradient sync asks for."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> torch.nn.Module:
        plain = torch.nn.LayerNorm if config.normalization == "LayerNorm" else torch.nn.RMSNorm
        kind = ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else plain
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        for param in norm.parameters():
            param.sequence_parallel = config.sequence_parallel
        return norm


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm by 1 + w, in float32 whatever x is, as Gemma's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


LAYER = ModuleSpec(
    module=TransformerLayer,
    submodules=TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnLinear, core_attention=SDPACoreAttention, linear_proj=RowLinear
            ),
        ),
        pre_mlp_layernorm=Norm,
        mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)),
    ),
)


def with_norms_behind(kind: type[NormsBehind], **submodules) -> ModuleSpec:
    """LAYER as a layer of this kind, with these submodules."""
    return replace(LAYER, module=kind, submodules=NormsBehindSubmodules(**vars(LAYER.submodules) | submodules))


def with_attention(**submodules) -> ModuleSpec:
    """LAYER with these submodules in its self-attention, beside the common ones or instead."""
    attention = LAYER.submodules.self_attention
    attention = replace(attention, submodules=replace(attention.submodules, **submodules))
    return replace(LAYER, submodules=replace(LAYER.submodules, self_attention=attention))


def block_spec(layer: ModuleSpec, config: TransformerConfig, pp_rank: int, *, final_norm: bool) -> TransformerBlockSubmodules:
    """This stage's layers and the final norm. A bare layer spec would give the final norm megatron's own, which refuses SP."""
    layers = [layer] * get_num_layers_to_build(config, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm if final_norm else None)
