"""Mixtures on a GPU. Each logit is read once more than for a KL; the mathematics are those of `rows`, the walk is `triton_rows`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kl.rows import Merged
from ..triton_rows import (
    LN2,
    LOG2E,
    NEG,
    aligned,
    clear,
    load_columns,
    on_device_of,
    row_start,
    slice_bounds,
    split_over,
    store_columns,
    warps,
)

BLOCK, WARPS = 2048, 8
SKEW, JSD, TVD = 0, 1, 2
OPS = {"jsd": JSD, "tvd": TVD}  # of an objective; the others are skewed KLs
_JSD, _TVD = tl.constexpr(JSD), tl.constexpr(TVD)


@triton.jit
def _mixture(q, p, offs, lo, hi, k, top_q, log_q, top_p, log_p, log_share, log_rest, OP: tl.constexpr, MASKED: tl.constexpr):
    """q, p, log2 q/m, log2 p/m and p q / m, of which TVD needs the first two only."""
    u = tl.maximum(tl.fma(load_columns(q, offs, lo, hi, MASKED), k, -top_q) - log_q, NEG)
    v = tl.maximum(tl.fma(load_columns(p, offs, lo, hi, MASKED), k, -top_p) - log_p, NEG)
    m = v
    if OP != _TVD:
        top = tl.maximum(v + log_share, u + log_rest)
        m = top + tl.log2(tl.exp2(v + log_share - top) + tl.exp2(u + log_rest - top))
    return tl.exp2(u), tl.exp2(v), u - m, v - m, tl.exp2(u + v - m)


@triton.jit
def _mixture_terms(q, p, offs, lo, hi, k, top_q, log_q, top_p, log_p, log_share, log_rest,
                   OP: tl.constexpr, MASKED: tl.constexpr):
    eq, ep, log_q_m, log_p_m, r = _mixture(q, p, offs, lo, hi, k, top_q, log_q, top_p, log_p, log_share, log_rest, OP, MASKED)
    if OP == _TVD:
        return tl.where(eq > ep, eq, 0.0), tl.where(eq > ep, ep, 0.0)
    elif OP == _JSD:
        return ep * (log_p_m * LN2), eq * (log_q_m * LN2)
    else:
        return ep * (log_p_m * LN2), r


@triton.jit
def _mixture_gradient_tile(q, p, grad_q, grad_p, offs, lo, hi, k, top_q, log_q, top_p, log_p, share, log_share, log_rest,
                           x, y, scale, OP: tl.constexpr, WANT_Q: tl.constexpr, WANT_P: tl.constexpr, MASKED: tl.constexpr):
    eq, ep, log_q_m, log_p_m, r = _mixture(q, p, offs, lo, hi, k, top_q, log_q, top_p, log_p, log_share, log_rest, OP, MASKED)
    if OP == _TVD:
        more = tl.where(eq > ep, 1.0, 0.0)
        dq = eq * (more - x)
        dp = ep * (y - more)
    elif OP == _JSD:
        dq = (1.0 - share) * eq * (log_q_m * LN2 - y)
        dp = share * ep * (log_p_m * LN2 - x)
    else:
        dq = (1.0 - share) * (eq * y - r)
        dp = ep * (log_p_m * LN2 - x) + (1.0 - share) * (r - ep * y)
    if WANT_Q:
        store_columns(grad_q, offs, dq * scale, lo, hi, MASKED)
    if WANT_P:
        store_columns(grad_p, offs, dp * scale, lo, hi, MASKED)


@triton.jit(do_not_specialize=["rows"])
def mixture_sums_kernel(
    q_ptr, p_ptr,              # [N, V]: the roles of `rows` (exchanged by the caller for skew_reverse_kl)
    top_q_ptr, sum_q_ptr, top_p_ptr, sum_p_ptr,    # [N] float32, from merge_kernel
    weights_ptr,               # [N] float32
    out_ptr,                   # [P, 2, N] float32, nats: x and y
    stride_q, stride_p, rows, columns, split_columns, k, log_share, log_rest,
    OP: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    out = out_ptr + split.to(tl.int64) * 2 * rows + row
    if HAS_WEIGHTS:  # noqa: SIM102, an `and` would load the weight in either case
        if tl.load(weights_ptr + row) == 0.0:
            tl.store(out, 0.0)
            tl.store(out + rows, 0.0)
            return
    q = row_start(q_ptr, row, stride_q, ALIGNED)
    p = row_start(p_ptr, row, stride_p, ALIGNED)
    start, lo, hi = slice_bounds(row, stride_q, split, columns, split_columns, ALIGNED)
    top_q = tl.load(top_q_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    log_q = tl.log2(tl.load(sum_q_ptr + row))
    log_p = tl.log2(tl.load(sum_p_ptr + row))
    x = tl.zeros((BLOCK,), tl.float32)
    y = tl.zeros((BLOCK,), tl.float32)
    for tile in range(start, hi, BLOCK):
        offs = tl.multiple_of(tile, 8) + tl.arange(0, BLOCK)
        if (tile >= lo) & (tile + BLOCK <= hi):
            dx, dy = _mixture_terms(q, p, offs, lo, hi, k, top_q, log_q, top_p, log_p, log_share, log_rest, OP, False)
        else:
            dx, dy = _mixture_terms(q, p, offs, lo, hi, k, top_q, log_q, top_p, log_p, log_share, log_rest, OP, True)
        x += dx
        y += dy
    tl.store(out, tl.sum(x, 0))
    tl.store(out + rows, tl.sum(y, 0))


@triton.jit
def mixture_gradient_kernel(
    q_ptr, p_ptr, top_q_ptr, sum_q_ptr, top_p_ptr, sum_p_ptr,    # as in mixture_sums_kernel
    x_ptr, y_ptr,              # [N] float32, of the whole vocabulary
    scale_ptr,                 # [N] float32; a row of scale 0 is not read and gets zeros
    grad_q_ptr, grad_p_ptr,    # [N, V]; may be q and p themselves
    stride_q, stride_p, stride_grad_q, stride_grad_p, columns, split_columns, k, share, log_share, log_rest,
    OP: tl.constexpr, WANT_Q: tl.constexpr, WANT_P: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    q = row_start(q_ptr, row, stride_q, ALIGNED)
    p = row_start(p_ptr, row, stride_p, ALIGNED)
    grad_q = row_start(grad_q_ptr, row, stride_grad_q, ALIGNED)
    grad_p = row_start(grad_p_ptr, row, stride_grad_p, ALIGNED)
    start, lo, hi = slice_bounds(row, stride_q, tl.program_id(1), columns, split_columns, ALIGNED)
    scale = tl.load(scale_ptr + row)
    if scale == 0.0:
        clear(grad_q, grad_p, start, lo, hi, WANT_Q, WANT_P, BLOCK)
        return
    top_q = tl.load(top_q_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    log_q = tl.log2(tl.load(sum_q_ptr + row))
    log_p = tl.log2(tl.load(sum_p_ptr + row))
    x = tl.load(x_ptr + row)
    y = tl.load(y_ptr + row)
    for tile in range(start, hi, BLOCK):
        offs = tl.multiple_of(tile, 8) + tl.arange(0, BLOCK)
        if (tile >= lo) & (tile + BLOCK <= hi):
            _mixture_gradient_tile(q, p, grad_q, grad_p, offs, lo, hi, k, top_q, log_q, top_p, log_p, share, log_share,
                                   log_rest, x, y, scale, OP, WANT_Q, WANT_P, False)
        else:
            _mixture_gradient_tile(q, p, grad_q, grad_p, offs, lo, hi, k, top_q, log_q, top_p, log_p, share, log_share,
                                   log_rest, x, y, scale, OP, WANT_Q, WANT_P, True)


# ------------------------------------------------------------------------------------------------------------ launches


def _mixture_roles(student, teacher, objective: str) -> tuple:
    """skew_reverse_kl is skew_forward_kl with the models exchanged."""
    return (teacher, student) if objective == "skew_reverse_kl" else (student, teacher)


def _mixture_rows(merged: Merged, objective: str) -> tuple[Tensor, ...]:
    q, p = _mixture_roles((merged.top_a, merged.sum_a), (merged.top_b, merged.sum_b), objective)
    return (*q, *p)


def sums(q_NV: Tensor, p_NV: Tensor, merged: Merged, *, objective: str, share: float, weights: Tensor | None = None,
                 temperature: float = 1.0) -> Tensor:
    """[2, N]: x and y of this shard; see `rows.sums`."""
    q_NV, p_NV = _mixture_roles(q_NV, p_NV, objective)
    return _mixture_sums_op(q_NV, p_NV, *_mixture_rows(merged, objective), weights, OPS.get(objective, SKEW), share, temperature)


@torch.library.custom_op("megakd_kernels::mixture_sums", mutates_args=())
def _mixture_sums_op(q: Tensor, p: Tensor, top_q: Tensor, sum_q: Tensor, top_p: Tensor, sum_p: Tensor, weights: Tensor | None,
                     op: int, share: float, temperature: float) -> Tensor:
    rows, columns = q.shape
    splits, split_columns = split_over(q, BLOCK)
    out = q.new_empty(splits, 2, rows, dtype=torch.float32)
    with on_device_of(q):
        mixture_sums_kernel[(rows, splits)](
            q, p, top_q, sum_q, top_p, sum_p, out if weights is None else weights, out, q.stride(0), p.stride(0), rows, columns,
            split_columns, LOG2E / temperature, math.log2(share), math.log2(1 - share), OP=op, HAS_WEIGHTS=weights is not None,
            ALIGNED=aligned(q, p), BLOCK=BLOCK, num_warps=warps(WARPS))
    return out.sum(0)


@_mixture_sums_op.register_fake
def _(q, p, top_q, sum_q, top_p, sum_p, weights, op, share, temperature):
    return q.new_empty(2, q.shape[0], dtype=torch.float32)


def gradient(q_NV: Tensor, p_NV: Tensor, merged: Merged, sums_2N: Tensor, scale_N: Tensor, *, objective: str,
                     share: float, temperature: float = 1.0, grad_q: Tensor | None = None, grad_p: Tensor | None = None) -> None:
    """Write the gradients into grad_q (student) and grad_p (teacher); see `rows.gradient`."""
    q_NV, p_NV = _mixture_roles(q_NV, p_NV, objective)
    grad_q, grad_p = _mixture_roles(grad_q, grad_p, objective)
    _mixture_gradient_op(q_NV, p_NV, *_mixture_rows(merged, objective), *sums_2N.unbind(0), scale_N.float().contiguous(),
                         OPS.get(objective, SKEW), share, temperature, grad_q, grad_p)


@torch.library.custom_op("megakd_kernels::mixture_gradient", mutates_args=("grad_q", "grad_p"))
def _mixture_gradient_op(q: Tensor, p: Tensor, top_q: Tensor, sum_q: Tensor, top_p: Tensor, sum_p: Tensor, x: Tensor,
                         y: Tensor, scale: Tensor, op: int, share: float, temperature: float, grad_q: Tensor | None,
                         grad_p: Tensor | None) -> None:
    rows, columns = q.shape
    splits, split_columns = split_over(q, BLOCK)
    gq, gp = (q if g is None else g for g in (grad_q, grad_p))
    with on_device_of(q):
        mixture_gradient_kernel[(rows, splits)](
            q, p, top_q, sum_q, top_p, sum_p, x, y, scale, gq, gp, q.stride(0), p.stride(0), gq.stride(0), gp.stride(0), columns,
            split_columns, LOG2E / temperature, share, math.log2(share), math.log2(1 - share), OP=op, WANT_Q=grad_q is not None,
            WANT_P=grad_p is not None, ALIGNED=aligned(q, p, grad_q, grad_p), BLOCK=BLOCK, num_warps=warps(WARPS))


@_mixture_gradient_op.register_fake
def _(*args):
    return None
