"""A transformer layer that computes the same way in training and in decoding, out of megatron-core's modules.

megatron-core's own layer and attention ask at every call for what this project never switches on (cross-attention, offloading,
selective recomputation, its own CUDA graphs): in a small model that decodes a few rows, a quarter of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer import attention, transformer_layer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from megakd.models.kv_cache import CacheStep
from megakd.models.packed_rows import PackedRows
from megakd.models.rope import rotate

WithBias = tuple[Tensor, Tensor | None]  # megatron's linear layers leave it to the layer to add their bias


class TransformerLayer(transformer_layer.TransformerLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)), [s, b, h]."""

    __call__ = nn.Module.__call__  # megatron's looks for a captured graph of the layer

    def forward(
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Tensor | None = None,
        inference_context: CacheStep | None = None,
        packed_seq_params: PackedRows | None = None,
        **_,
    ) -> tuple[Tensor, None]:
        x = hidden_states
        x = self.behind_attention(x, self.self_attention(self.input_layernorm(x), rotary_pos_emb, inference_context, packed_seq_params))
        x = self.behind_mlp(x, self.mlp(self.pre_mlp_layernorm(x)))
        return x, None

    def behind_attention(self, residual: Tensor, output_with_bias: WithBias) -> Tensor:
        """What the layer goes on with behind attention."""
        return self.add(residual, output_with_bias)

    def behind_mlp(self, residual: Tensor, output_with_bias: WithBias) -> Tensor:
        """What the layer hands on behind its MLP."""
        return self.add(residual, output_with_bias)

    def add(self, residual: Tensor, output_with_bias: WithBias) -> Tensor:
        """Residual, output and its bias; in training with dropout."""
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        if self.training:
            output = F.dropout(output, self.hidden_dropout)
        return residual + output


@dataclass
class NormsBehindSubmodules(transformer_layer.TransformerLayerSubmodules):
    """With those that stand behind attention and behind the MLP."""

    post_self_attn_layernorm: ModuleSpec | type = IdentityOp
    post_mlp_layernorm: ModuleSpec | type = IdentityOp


class NormsBehind(TransformerLayer):
    """A layer that has such norms; `behind` says what they are given."""

    def __init__(self, config, submodules: NormsBehindSubmodules, **kwargs):
        super().__init__(config, submodules, **kwargs)
        sizes = {"hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_self_attn_layernorm = build_module(submodules.post_self_attn_layernorm, config=config, **sizes)
        self.post_mlp_layernorm = build_module(submodules.post_mlp_layernorm, config=config, **sizes)

    def behind_attention(self, residual, output_with_bias):
        return self.behind(residual, output_with_bias, self.post_self_attn_layernorm)

    def behind_mlp(self, residual, output_with_bias):
        return self.behind(residual, output_with_bias, self.post_mlp_layernorm)

    def behind(self, residual: Tensor, output_with_bias: WithBias, norm: nn.Module) -> Tensor:
        """Residual and output, joined and normed."""
        raise NotImplementedError


class PostNormLayer(NormsBehind):
    """norm(x + attention(x)), then norm(x + mlp(x)), as in the first transformer (Vaswani et al. 2017, arXiv 1706.03762)."""

    def behind(self, residual, output_with_bias, norm):
        return norm(self.add(residual, output_with_bias))


class SandwichNormLayer(NormsBehind):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def behind(self, residual, output_with_bias, norm):
        output, bias = output_with_bias
        return self.add(residual, (norm(output if bias is None else output + bias), None))


class SelfAttention(attention.SelfAttention):
    """A rotary table turns queries and keys, but in layers that have no positions; core attention has the cache.

    Where there are two tables, the last is that of the layers that slide.
    """

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        unknown = [name for name in ("attention_output_gate", "rotary_interleaved") if getattr(config, name)]
        assert not unknown and not self.checkpoint_core_attention, f"{unknown or 'selective recomputation'} is not built"
        self.sharers = max(1, self.tp_group.size() // config.num_query_groups)  # ranks that share one key/value head
        self.shared_group, self.member = divmod(self.tp_group.rank(), self.sharers)
        self.turns = not (config.no_rope_freq and config.no_rope_freq[self.layer_number - 1])
        self.table = 0 if self.core_attention.window is None else -1

    def forward(
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Tensor | None,
        inference_context: CacheStep | None,
        packed_seq_params: PackedRows | None = None,
    ) -> WithBias:
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        if rotary_pos_emb is not None and self.turns:
            query, key = rotate(query, key, rotary_pos_emb[self.table])
        attended = self.core_attention(
            query, key, value, inference_context=inference_context, packed_seq_params=packed_seq_params
        )
        return self.linear_proj(attended)

    def get_query_key_value_tensors(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[s, b, n, d] and twice [s, b, g, d], as megatron's, whose own asks global state for the tensor-parallel group.

        With fewer key/value heads than ranks, a rank's rows end inside a group: its ranks put it together, each takes its own queries.
        """
        qkv, _ = self.linear_qkv(hidden_states)  # for each group its r query heads, then its key, then its value
        if self.sharers > 1:
            whole = all_gather_last_dim_from_tensor_parallel_region(qkv, group=self.tp_group)
            qkv = whole.chunk(self.config.num_query_groups, -1)[self.shared_group]
        qkv = qkv.view(*qkv.shape[:2], self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
        query, key, value = qkv.split((qkv.shape[-2] - 2, 1, 1), -2)
        query, key, value = query.flatten(2, 3), key.squeeze(-2), value.squeeze(-2)
        if self.sharers > 1:
            query = query.chunk(self.sharers, 2)[self.member]
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        return query, key if self.k_layernorm is None else self.k_layernorm(key), value
