"""A few rows of logits at a time, in float32 scratch that stays in a CPU's cache: what the operators' `rows` share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .shards import FLOOR

CHUNK_NUMBERS = 2**19  # of one scratch tensor: 2 MB in float32, about a core's second-level cache


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def chunk_rows(x_NV: Tensor) -> int:
    """How many rows are worked on at a time."""
    return max(1, min(x_NV.shape[0], CHUNK_NUMBERS // max(1, x_NV.shape[1])))


def row_chunks(x_NV: Tensor, active_N: Tensor | None) -> Iterator[slice | Tensor]:
    """Rows to work on: slices of all rows, or indices of the active ones."""
    step = chunk_rows(x_NV)
    if active_N is None or bool(active_N.all()):
        return (slice(i, i + step) for i in range(0, x_NV.shape[0], step))
    return iter(active_N.nonzero()[:, 0].split(step))


def scratch(x_NV: Tensor, tensors: int) -> list[Tensor]:
    """Room for one chunk each, in the dtype that sums are made in; used again and again, it stays in the cache."""
    return [x_NV.new_empty(chunk_rows(x_NV), x_NV.shape[1], dtype=accumulation_dtype(x_NV)) for _ in range(tensors)]


def scaled(x_NV: Tensor, rows: slice | Tensor, temperature: float, out_RV: Tensor) -> Tensor:
    """Some rows divided by the temperature, in scratch."""
    x_RV = x_NV[rows]
    x_RV = out_RV[: len(x_RV)].copy_(x_RV)
    return x_RV if temperature == 1 else x_RV.div_(temperature)


def centred(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """x minus its row maximum, in place, and that maximum; an empty row has the maximum FLOOR."""
    if x_RV.shape[1] == 0:
        return x_RV, x_RV.new_full((x_RV.shape[0],), FLOOR)
    top_R1 = x_RV.amax(-1, keepdim=True).clamp_min_(FLOOR)
    return x_RV.sub_(top_R1).clamp_min_(FLOOR), top_R1[:, 0]


def write_rows(out_NV: Tensor, rows: slice | Tensor, x_RV: Tensor) -> None:
    """`rows` as `row_chunks` gives them; x is rounded to out's dtype."""
    if isinstance(rows, slice):
        out_NV[rows].copy_(x_RV)  # rounds while it copies
    else:
        out_NV[rows] = x_RV.to(out_NV.dtype)


def clear_inactive(active_N: Tensor, *grads_NV: Tensor | None) -> None:
    """Zeros in the gradients' rows that nothing else writes."""
    if not bool(active_N.all()):
        for grad_NV in grads_NV:
            if grad_NV is not None:
                grad_NV[~active_N] = 0
