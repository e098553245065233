"""Keys and values of one stage's layers, allocated once for the longest a row can become.

B rows, S columns of a step, g key/value heads on this rank, L columns in all, d head size.

A row's columns lie together, so that a step reads them in one sweep, and only the filled ones are read. When a row is finished,
the last live row moves into the gap: one row is copied, and all addresses stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.inference.contexts import BaseInferenceContext
from megatron.core.transformer.attention import Attention
from torch import Tensor


class KVCache:
    """[B, g, L, d] twice for every attention module, by megatron's layer number."""

    def __init__(self, attentions: Sequence[Attention], rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        self.layers = {}
        for attention in attentions:
            shape = (2, rows, attention.num_query_groups_per_partition, columns, attention.hidden_size_per_attention_head)
            # zeros: a masked column has weight 0, and 0 · NaN is NaN
            self.layers[attention.layer_number] = torch.zeros(shape, dtype=dtype, device=device).unbind()

    def move(self, sources: list[int], targets: list[int], filled: int) -> None:
        """Copy rows over others, `filled` columns of them."""
        for source, target in zip(sources, targets):
            for cache in (tensor for layer in self.layers.values() for tensor in layer):
                cache[target, :, :filled] = cache[source, :, :filled]


class CacheStep(BaseInferenceContext):
    """What megatron's layers hand through to attention: S columns of some rows are computed and stored, `filled` are attended to."""

    def __init__(self, cache: KVCache, rows: slice, columns_S: Tensor, filled: int):
        super().__init__(materialize_only_last_token_logits=True)
        self.cache, self.rows, self.columns_S, self.filled = cache, rows, columns_S, filled

    def is_static_batching(self) -> bool:
        """All rows go on together, in memory that is theirs from the beginning."""
        return True

    def is_decode_only(self) -> bool:
        """No: megatron would leave its attention for flash decoding."""
        return False

    def store(self, layer_number: int, keys_SBgd: Tensor, values_SBgd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the step's columns; returns the filled ones of its rows, [filled, B, g, d] twice."""
        stored = []
        for cache_BgLd, new_SBgd in zip(self.cache.layers[layer_number], (keys_SBgd, values_SBgd)):
            rows_BgLd = cache_BgLd[self.rows]
            rows_BgLd.index_copy_(2, self.columns_S, new_SBgd.permute(1, 2, 0, 3))
            stored.append(rows_BgLd[:, :, : self.filled].permute(2, 0, 1, 3))
        return stored[0], stored[1]
