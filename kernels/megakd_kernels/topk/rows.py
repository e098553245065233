"""Bucket statistics and gradient in plain torch, a few rows at a time. The mathematics are in `topk` and in `loss`.

N rows, V columns here, K tokens a row. `columns_NK` count from the first column here; another rank's token is column V.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..row_chunks import accumulation_dtype, centred, row_chunks, scratch
from ..shards import FLOOR


def statistics(logits_NV: Tensor, columns_NK: Tensor, weights: Tensor | None) -> Tensor:
    """[1, K + 3, N]: the tokens' logits (FLOOR where another rank holds them), maximum A of the others, sum of e^(z - A), and the
    minimum of all."""
    stats_KN = logits_NV.new_empty(columns_NK.shape[1] + 3, len(logits_NV), dtype=accumulation_dtype(logits_NV))
    for rows, z, columns in _padded(logits_NV, columns_NK, None if weights is None else weights != 0):
        stats_KN[:-3, rows] = z.gather(1, columns).t()
        bottom = z[:, :-1].amin(-1) if z.shape[1] > 1 else -z[:, 0]  # an empty shard has none: as high as FLOOR is low
        u, A = centred(z.scatter_(1, columns, FLOOR))
        stats_KN[-3:, rows] = torch.stack([A, u.exp_().sum(-1), bottom])
    return stats_KN[None]


def gradient(logits_NV: Tensor, columns_NK: Tensor, slopes_NB: Tensor, top_N: Tensor, sum_N: Tensor, grad_NV: Tensor) -> None:
    """Write the gradient, from that of the K + 1 buckets' logits, into grad_NV, which may be the logits themselves."""
    rest_N = slopes_NB[:, -1] / sum_N
    for rows, z, columns in _padded(logits_NV, columns_NK, (slopes_NB != 0).any(-1)):
        z.scatter_(1, columns, FLOOR).sub_(top_N[rows, None]).exp_().mul_(rest_N[rows, None])
        grad_NV[rows] = z.scatter_(1, columns, slopes_NB[rows, :-1])[:, :-1].to(grad_NV.dtype)


def _padded(logits_NV: Tensor, columns_NK: Tensor, active_N: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Chunks of rows in scratch with one more column, for what is not here; inactive rows are zeros whatever they hold."""
    (scratch_RV,) = scratch(logits_NV.new_empty(1, 1).expand(len(logits_NV), logits_NV.shape[1] + 1), 1)
    for rows in row_chunks(scratch_RV.new_empty(1, 1).expand(len(logits_NV), logits_NV.shape[1] + 1), None):
        z = scratch_RV[: len(logits_NV[rows])]
        z[:, :-1] = logits_NV[rows] if active_N is None else torch.where(active_N[rows, None], logits_NV[rows], 0.0)
        z[:, -1] = FLOOR
        yield rows, z.clamp_min_(FLOOR), columns_NK[rows]
