"""Core attention in megatron-core's shapes: flash-attn's kernels where it is installed, else torch's scaled_dot_product_attention.

s sequence, b batch, n heads, g key/value heads (GQA: g divides n), d head size.

Training batches are right-padded and pass no mask: under causal attention a real position never sees the padding behind it.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


class SDPACoreAttention(MegatronModule):
    """softmax(q kᵀ / √d) v, causal. Exact for GQA and under tensor parallelism (heads are already this rank's)."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type="self", attention_dropout=None, softmax_scale=None, **_
    ):
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism is not built"
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(self, query_sbnd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor, attention_mask=None, **_) -> Tensor:
        """[s, b, n, d] and twice [s, b, g, d] to [s, b, n·d]."""
        assert attention_mask is None, "right-padded batches need no mask; left-padded prompts are decoded by megakd.generation"
        attend = flash_attention if can_flash(query_sbnd) else sdpa_attention
        dropout = self.dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else nullcontext():
            return attend(query_sbnd, key_sbgd, value_sbgd, dropout, self.softmax_scale).flatten(2)


def can_flash(query_sbnd: Tensor) -> bool:
    """flash-attn is installed, and takes tensors like these."""
    return flash_attn_func is not None and query_sbnd.is_cuda and query_sbnd.dtype in (torch.float16, torch.bfloat16)


def flash_attention(query_sbnd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor, dropout: float, scale: float | None) -> Tensor:
    """[s, b, n, d], by flash-attn's own kernels."""
    query, key, value = (x.transpose(0, 1) for x in (query_sbnd, key_sbgd, value_sbgd))
    return flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scale, causal=True).transpose(0, 1)


def sdpa_attention(query_sbnd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor, dropout: float, scale: float | None) -> Tensor:
    """[s, b, n, d], by torch, which picks a kernel for the device."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbnd, key_sbgd, value_sbgd))
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=gqa)
    return out.permute(2, 0, 1, 3)
