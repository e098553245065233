"""Keys and values of one stage's layers, allocated once for the longest a row can become.

B rows, g key/value heads on this rank, L columns, d head size.

A row's columns lie together, so that a step reads them in one sweep, and only the filled ones are read. When a row is finished,
the last live row moves into the gap: one row is copied, and all addresses stay.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """`shape` is layers, B, g, L, d."""

    def __init__(self, shape: tuple[int, int, int, int, int], *, dtype: torch.dtype, device: torch.device):
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # zeros: a masked column has weight 0, and 0 · NaN is NaN
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def store(
        self, layer: int, rows: slice, columns_S: Tensor, keys_BgSd: Tensor, values_BgSd: Tensor, filled: int
    ) -> tuple[Tensor, Tensor]:
        """Write S columns of some rows; returns the first `filled` columns of those rows, [B, g, filled, d] twice."""
        keys, values = self.keys[layer, rows], self.values[layer, rows]
        keys.index_copy_(2, columns_S, keys_BgSd)
        values.index_copy_(2, columns_S, values_BgSd)
        return keys[:, :, :filled], values[:, :, :filled]

    def move(self, sources: list[int], targets: list[int], filled: int) -> None:
        """Copy rows over others, `filled` columns of them."""
        for source, target in zip(sources, targets):
            for cache in (self.keys, self.values):
                cache[:, target, :, :filled] = cache[:, source, :, :filled]
