"""Core attention on torch's scaled_dot_product_attention (which picks flash kernels on a GPU), in megatron-core's shapes.

s sequence, b batch, n heads, g key/value heads (GQA: g divides n), d head size.

Training batches are right-padded and pass no mask: under causal attention a real position never sees the padding behind it.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


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
        s, b, n, d = query_sbnd.shape
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbnd, key_sbgd, value_sbgd))
        dropout = self.dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else nullcontext():
            out = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=self.softmax_scale, enable_gqa=n != key_sbgd.shape[2]
            )
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)
