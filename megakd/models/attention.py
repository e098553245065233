"""Core attention in megatron-core's shapes, for training and for decoding on a cache.

s sequence, b batch, n query heads, g key/value heads (GQA: g divides n), r = n / g, d head size, l filled columns of the cache.
A layer that slides has a window: a token sees the last `window` tokens, itself among them.

Training batches are right-padded and have no mask: under causal attention a real position never sees the padding behind it. flash-attn's
kernels attend where it is installed, else torch's scaled_dot_product_attention. Packed rows stand one behind the other, [s, 1, n, d]:
flash-attn is told where each begins, and torch is given neighbours that are as long as each other as a batch.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megakd.models.kv_cache import CacheStep
from megakd.models.packed_rows import PackedRows

try:
    from flash_attn import flash_attn_func, flash_attn_varlen_func
except ImportError:
    flash_attn_func = flash_attn_varlen_func = None


class SDPACoreAttention(MegatronModule):
    """softmax(q kᵀ / √d) v, causal. Exact for GQA and under tensor parallelism (heads are already this rank's)."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type="self", attention_dropout=None, softmax_scale=None, **_
    ):
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism is not built"
        self.layer_number, self.softmax_scale = layer_number, softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if slides else None

    def forward(
        self,
        query_sbnd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        *,
        inference_context: CacheStep | None = None,
        packed_seq_params: PackedRows | None = None,
    ) -> Tensor:
        """[s, b, n, d] and twice [s, b, g, d] to [s, b, n·d]; decoding attends to what the cache holds of earlier columns too."""
        if inference_context is not None:
            keys_bgld, values_bgld = inference_context.store(self.layer_number, key_sbgd, value_sbgd)
            return masked_attention(query_sbnd, keys_bgld, values_bgld, inference_context.masks[self.window], self.softmax_scale)
        if packed_seq_params is None:
            attend = flash_attention if can_flash(query_sbnd) else sdpa_attention
        else:
            attend = partial(flash_varlen_attention if can_flash(query_sbnd) else attention_by_blocks, packed_seq_params)
        dropout = self.dropout if self.training else 0.0
        with tensor_parallel.get_cuda_rng_tracker().fork() if dropout else nullcontext():
            return attend(query_sbnd, key_sbgd, value_sbgd, dropout, self.softmax_scale, self.window).flatten(2)


def can_flash(query_sbnd: Tensor) -> bool:
    """flash-attn is installed, and takes tensors like these."""
    return flash_attn_func is not None and query_sbnd.is_cuda and query_sbnd.dtype in (torch.float16, torch.bfloat16)


def flash_attention(
    query_sbnd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor, dropout: float, scale: float | None, window: int | None
) -> Tensor:
    """[s, b, n, d], by flash-attn's own kernels, which count the columns before a token's own."""
    query, key, value = (x.transpose(0, 1) for x in (query_sbnd, key_sbgd, value_sbgd))
    reach = (-1 if window is None else window - 1, 0)
    out = flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scale, causal=True, window_size=reach)
    return out.transpose(0, 1)


def flash_varlen_attention(
    packed: PackedRows, query_s1nd: Tensor, key_s1gd: Tensor, value_s1gd: Tensor, dropout: float, scale: float | None, window: int | None
) -> Tensor:
    """[s, 1, n, d] of packed rows, by flash-attn's own kernels."""
    ends = (packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.max_seqlen_q, packed.max_seqlen_kv)
    reach = (-1 if window is None else window - 1, 0)
    query, key, value = (x.squeeze(1) for x in (query_s1nd, key_s1gd, value_s1gd))
    options = {"dropout_p": dropout, "softmax_scale": scale, "causal": True, "window_size": reach}
    return flash_attn_varlen_func(query, key, value, *ends, **options).unsqueeze(1)


def attention_by_blocks(packed: PackedRows, query_s1nd: Tensor, key_s1gd: Tensor, value_s1gd: Tensor, *options) -> Tensor:
    """[s, 1, n, d] of packed rows: neighbours that are as long as each other are a batch to torch."""
    blocks = packed.blocks
    split = lambda x: x.squeeze(1).split([size * rows for size, rows in blocks])
    attended = []
    for (size, rows), *part in zip(blocks, *map(split, (query_s1nd, key_s1gd, value_s1gd))):
        out = sdpa_attention(*(x.unflatten(0, (rows, size)).transpose(0, 1) for x in part), *options)
        attended.append(out.transpose(0, 1).flatten(0, 1))
    return torch.cat(attended).unsqueeze(1)


def sdpa_attention(
    query_sbnd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor, dropout: float, scale: float | None, window: int | None
) -> Tensor:
    """[s, b, n, d], by torch, which picks a kernel for the device."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbnd, key_sbgd, value_sbgd))
    s, r = query.shape[2], query.shape[1] // key.shape[1]
    if window is None or window >= s:
        seen = {"is_causal": True, "enable_gqa": r > 1}
    else:  # with a mask and unequal heads torch has no kernel that leaves the scores unwritten
        seen = {"attn_mask": sliding_mask(s, window, query.device)}
        key, value = key.repeat_interleave(r, 1), value.repeat_interleave(r, 1)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=scale, **seen).permute(2, 0, 1, 3)


def sliding_mask(s: int, window: int, device: torch.device) -> Tensor:
    """[s, s], true where a token sees another."""
    distance = torch.arange(s, device=device)[:, None] - torch.arange(s, device=device)
    return (distance >= 0) & (distance < window)


def masked_attention(query_sbnd: Tensor, key_bgld: Tensor, value_bgld: Tensor, mask_b1sl: Tensor, scale: float | None) -> Tensor:
    """[s, b, n·d]; the mask is added to the scores. The r query heads of a group are r more queries: one kernel for MHA and GQA."""
    s, b, n, d = query_sbnd.shape
    g = key_bgld.shape[1]
    r = n // g
    if s == 1:
        query = query_sbnd.reshape(b, g, r, d)
        return F.scaled_dot_product_attention(query, key_bgld, value_bgld, mask_b1sl, scale=scale).reshape(1, b, n * d)
    query = query_sbnd.reshape(s, b, g, r, d).permute(1, 2, 3, 0, 4).reshape(b, g, r * s, d)
    out = F.scaled_dot_product_attention(query, key_bgld, value_bgld, mask_b1sl.repeat(1, 1, r, 1), scale=scale)
    return out.view(b, g, r, s, d).permute(3, 0, 1, 2, 4).reshape(s, b, n * d)
