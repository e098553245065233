"""Cross-entropy statistics and gradient in plain torch, a few rows at a time. The mathematics are in `loss`.

N rows, V columns here, P partial statistics. `labels_N` count from the first column here; another rank's label is out of range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..row_chunks import accumulation_dtype, centred, clear_inactive, row_chunks, scaled, scratch, write_rows
from ..shards import FLOOR


def statistics(logits_NV: Tensor, labels_N: Tensor, weights: Tensor | None) -> Tensor:
    """[1, 3, N]: maximum A, sum of e^(z - A), and the label's z - A, FLOOR where another rank holds it."""
    stats_3N = logits_NV.new_zeros(3, logits_NV.shape[0], dtype=accumulation_dtype(logits_NV))
    stats_3N[1] = 1.0  # of a row that is not read: its loss is log 1
    (scratch_RV,) = scratch(logits_NV, 1)
    for rows in row_chunks(logits_NV, None if weights is None else weights != 0):
        u, A = centred(scaled(logits_NV, rows, 1.0, scratch_RV))
        here_R, column_R = _own(labels_N[rows], u.shape[1])
        label_R = u.gather(1, column_R[:, None])[:, 0] if u.shape[1] else torch.full_like(A, FLOOR)
        stats_3N[:, rows] = torch.stack([A, u.exp_().sum(-1), label_R.where(here_R, FLOOR)])
    return stats_3N[None]


def gradient(logits_NV: Tensor, labels_N: Tensor, top_N: Tensor, sum_N: Tensor, scale_N: Tensor, grad_NV: Tensor) -> None:
    """Write scale (softmax - one-hot) into grad_NV, which may be the logits themselves."""
    active_N = scale_N != 0
    (scratch_RV,) = scratch(logits_NV, 1)
    for rows in row_chunks(logits_NV, active_N):
        p = scaled(logits_NV, rows, 1.0, scratch_RV).sub_(top_N[rows, None]).exp_().div_(sum_N[rows, None])
        here_R, column_R = _own(labels_N[rows], p.shape[1])
        if p.shape[1]:
            p.scatter_add_(1, column_R[:, None], -here_R.to(p.dtype)[:, None])
        write_rows(grad_NV, rows, p.mul_(scale_N[rows, None]))
    clear_inactive(active_N, grad_NV)


def _own(label_R: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    here_R = (label_R >= 0) & (label_R < columns)
    return here_R, label_R.where(here_R, 0)
