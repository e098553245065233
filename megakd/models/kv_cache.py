"""Keys and values of one stage's layers, allocated once for the longest a row can become.

B rows, S columns of a step, g key/value heads on this rank, L columns in all, d head size.

A row's columns lie together, so that a step reads them in one sweep, and only the filled ones are read. When a row is finished,
the last live row moves into the gap: one row is copied, and all addresses stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.attention import Attention
from torch import Tensor


class KVCache:
    """[B, g, L, d] twice for every attention module, by megatron's layer number."""

    def __init__(self, attentions: Sequence[Attention], rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        self.both, self.layers = [], {}
        for attention in attentions:
            shape = (2, rows, attention.num_query_groups_per_partition, columns, attention.hidden_size_per_attention_head)
            # zeros: a masked column has weight 0, and 0 · NaN is NaN
            self.both.append(torch.zeros(shape, dtype=dtype, device=device))
            self.layers[attention.layer_number] = self.both[-1].unbind()

    def move(self, sources: Tensor, targets: Tensor, filled: int) -> None:
        """Copy rows over others, `filled` columns of them."""
        if len(sources):
            for both in self.both:
                both[:, targets, :, :filled] = both[:, sources, :, :filled]

    def copy(self, sources: Tensor, first: int, filled: int) -> None:
        """Rows from `first` on become those of `sources`, `filled` columns of them; they may be among them."""
        for both in self.both:
            both[:, first : first + len(sources), :, :filled] = both[:, sources, :, :filled]


class CacheStep:
    """What attention is given beside the hidden states of S columns of some rows; `filled` columns are attended to.

    A mask [B, 1, S, filled] is added to their scores, `masks` has that of each window.
    """

    def __init__(self, cache: KVCache, rows: slice, columns_S: Tensor, filled: int, masks: dict[int | None, Tensor]):
        self.cache, self.rows, self.columns_S, self.filled, self.masks = cache, rows, columns_S, filled, masks

    def store(self, layer_number: int, keys_SBgd: Tensor, values_SBgd: Tensor) -> tuple[Tensor, Tensor]:
        """Write the step's columns; returns the filled ones of its rows, [B, g, filled, d] twice."""
        keys, values = (layer[self.rows] for layer in self.cache.layers[layer_number])
        keys.index_copy_(2, self.columns_S, keys_SBgd.permute(1, 2, 0, 3))
        values.index_copy_(2, self.columns_S, values_SBgd.permute(1, 2, 0, 3))
        return keys.narrow(2, 0, self.filled), values.narrow(2, 0, self.filled)
