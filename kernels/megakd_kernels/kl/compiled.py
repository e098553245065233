"""The divergences of `rows` with torch.compile making two loops of each: an option for CPUs with a C++ compiler.

The formulas are written in two explicit passes, the form that the compiler fuses; log_softmax would make it read a row six times.
The first call compiles for a second or two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch._dynamo
from torch import Tensor

from ..row_chunks import accumulation_dtype, clear_inactive, row_chunks
from ..shards import FLOOR
from . import rows as rows_
from .rows import Merged, merge

VERSIONS = torch._dynamo.config.patch(recompile_limit=64)  # dtypes, sides, a third tensor, single rows: past 8, torch gives up compiling
__all__ = ["gradient", "merge", "statistics"]


@VERSIONS
def statistics(a_NV: Tensor, b_NV: Tensor, c_NV: Tensor | None = None, *, weights: Tensor | None = None,
               temperature: float = 1.0, difference: bool = False) -> Tensor:
    """[1, K, N]; see `rows.statistics`."""
    if not a_NV.shape[1]:  # an empty shard has no maximum to compile
        return rows_.statistics(a_NV, b_NV, c_NV, weights=weights, temperature=temperature, difference=difference)
    stats_KN = a_NV.new_zeros(5 if c_NV is None else 8, a_NV.shape[0], dtype=accumulation_dtype(a_NV))
    stats_KN[1::3] = 1.0
    for rows in _parts(a_NV, None if weights is None else weights != 0):
        third = None if c_NV is None else c_NV[rows]
        stats_KN[:, rows] = _statistics(a_NV[rows], b_NV[rows], third, torch.tensor(1 / temperature), difference)
    return stats_KN[None]


@VERSIONS
def gradient(a_NV: Tensor, b_NV: Tensor, c_NV: Tensor | None, merged: Merged, scale_N: Tensor, *, temperature: float = 1.0,
             coef: float | Tensor = 0.0, difference: bool = False, grad_a: Tensor | None = None,
             grad_b: Tensor | None = None) -> None:
    """Write the gradients into grad_a and grad_b; see `rows.gradient`."""
    active_N = scale_N != 0
    constant_N, coef = merged.row_constant(coef), torch.as_tensor(coef, dtype=scale_N.dtype)
    tops_N = merged.top_a, merged.top_b, merged.top_c
    scales_N = scale_N / merged.sum_a, scale_N / merged.sum_b
    grads_NV = grad_a, grad_b
    inplace = any(g is not None and g.data_ptr() == x.data_ptr() for g, x in zip(grads_NV, (a_NV, b_NV)))
    for rows in _parts(a_NV, active_N, inplace):
        logits = [None if x is None else x[rows] for x in (a_NV, b_NV, c_NV)]
        tops, scales = ([None if x is None else x[rows, None] for x in xs] for xs in (tops_N, scales_N))
        grads = [None if x is None else x.new_empty(logits[0].shape) if inplace else x[rows] for x in grads_NV]
        _gradient(*logits, tops, constant_N[rows, None], scales, coef, torch.tensor(1 / temperature), difference, *grads)
        if inplace or isinstance(rows, Tensor):  # then the loops wrote into copies
            for x, dx in zip(grads_NV, grads):
                if x is not None:
                    x[rows] = dx
    clear_inactive(active_N, grad_a, grad_b)


def _parts(x_NV: Tensor, active_N: Tensor | None, copied: bool = False) -> Iterator[slice | Tensor]:
    """All rows at once, of which the loops make no copy; or a few at a time, where some do not count or a copy is made."""
    if not copied and (active_N is None or bool(active_N.all())):
        return iter([slice(None)])
    return row_chunks(x_NV, active_N)


@torch.compile(dynamic=True)
def _statistics(a: Tensor, b: Tensor, c: Tensor | None, inverse_temperature: Tensor, difference: bool) -> Tensor:
    u, A = _centred(a, inverse_temperature)
    v, B = _centred(b, inverse_temperature)
    e = u.exp()
    rows = [A, e.sum(-1), (e * (u - v)).sum(-1), B, v.exp().sum(-1)]
    if c is not None:
        w, C = _centred(a.float() - c.float() if difference else c, inverse_temperature)
        rows += [(e * (u - w)).sum(-1), C, w.exp().sum(-1)]
    return torch.stack(rows)


@torch.compile(dynamic=True)
def _gradient(a: Tensor, b: Tensor, c: Tensor | None, tops: tuple, constant: Tensor, scales: tuple, coef: Tensor,
              inverse_temperature: Tensor, difference: bool, grad_a: Tensor | None, grad_b: Tensor | None) -> None:
    u = (a.float() * inverse_temperature - tops[0]).clamp_min(FLOOR)
    v = (b.float() * inverse_temperature - tops[1]).clamp_min(FLOOR)
    p = u.exp() * scales[0]
    ratio = u - v
    if c is not None:
        w = ((a.float() - c.float() if difference else c.float()) * inverse_temperature - tops[2]).clamp_min(FLOOR)
        ratio = ratio + coef * (u - w)
    if grad_a is not None:
        grad_a.copy_(p * (ratio - constant))
    if grad_b is not None:
        grad_b.copy_(v.exp() * scales[1] - p)


def _centred(x: Tensor, inverse_temperature: Tensor) -> tuple[Tensor, Tensor]:
    x = x.float() * inverse_temperature
    top = x.amax(-1, keepdim=True).clamp_min(FLOOR)
    return (x - top).clamp_min(FLOOR), top[:, 0]
