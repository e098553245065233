"""Kullback-Leibler divergences on a GPU: each logit is read once for the statistics and once for the gradient, and nothing else
is of its size.

The mathematics are those of `rows`, in base 2: u = k a - A with k = log2(e) / T, so that an exponential is one instruction. A tile
[R, L] of the walk over a row (`triton_rows`) is reduced over R inside each thread, and the L lanes keep private statistics, so that
nothing crosses a warp before the row ends. Registers, spills and widths on every card are held by
tests/kernel_tests/test_machine_code.py.

N rows, V columns here, K statistics (5 or 8), P partial statistics (splits, then ranks).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from .rows import Merged

STATISTICS_TILE = {5: (4, 1024, 4), 8: (2, 1024, 4)}  # K: R, L, warps. Three tensors at R = 4 take all 255 registers
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 8
MERGE_BLOCK, MERGE_WARPS = 128, 4


@triton.jit
def _statistics_tile(a, b, c, offs, lo, hi, k, A, SA, D, B, SB, E, C, SC,
                     HAS_C: tl.constexpr, DIFFERENCE: tl.constexpr, MASKED: tl.constexpr):
    x = load_columns(a, offs, lo, hi, MASKED)
    y = load_columns(b, offs, lo, hi, MASKED)
    A1 = tl.maximum(A, tl.max(x, 0) * k)
    B1 = tl.maximum(B, tl.max(y, 0) * k)
    u = tl.maximum(tl.fma(x, k, -A1[None, :]), NEG)
    v = tl.maximum(tl.fma(y, k, -B1[None, :]), NEG)
    e = tl.exp2(u)
    dA = A - A1
    dB = B - B1
    shrink = tl.exp2(dA)
    D = shrink * (D + (dA - dB) * SA) + tl.sum(e * (u - v), 0)
    if HAS_C:
        z = load_columns(c, offs, lo, hi, MASKED)
        if DIFFERENCE:
            z = x - z
            if MASKED:
                z = tl.where((offs >= lo) & (offs < hi), z, float("-inf"))
        C1 = tl.maximum(C, tl.max(z, 0) * k)
        w = tl.maximum(tl.fma(z, k, -C1[None, :]), NEG)
        dC = C - C1
        E = shrink * (E + (dA - dC) * SA) + tl.sum(e * (u - w), 0)
        SC = SC * tl.exp2(dC) + tl.sum(tl.exp2(w), 0)
        C = C1
    SA = SA * shrink + tl.sum(e, 0)
    SB = SB * tl.exp2(dB) + tl.sum(tl.exp2(v), 0)
    return A1, SA, D, B1, SB, E, C, SC


@triton.jit
def store_statistics(
    a, b, c, out,    # rows' starts, and where the K statistics of one slice go, `rows` numbers apart
    rows, start, lo, hi, k, HAS_C: tl.constexpr, DIFFERENCE: tl.constexpr, R: tl.constexpr, L: tl.constexpr,
):
    """Read columns lo to hi of a row once and write their statistics."""
    TILE: tl.constexpr = R * L
    lane = tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    A = tl.full((L,), NEG, tl.float32)
    B = tl.full((L,), NEG, tl.float32)
    C = tl.full((L,), NEG, tl.float32)
    SA = tl.zeros((L,), tl.float32)
    SB = tl.zeros((L,), tl.float32)
    SC = tl.zeros((L,), tl.float32)
    D = tl.zeros((L,), tl.float32)
    E = tl.zeros((L,), tl.float32)
    if lo > start:
        A, SA, D, B, SB, E, C, SC = _statistics_tile(a, b, c, start + lane, lo, hi, k, A, SA, D, B, SB, E, C, SC,
                                                     HAS_C, DIFFERENCE, True)
        start += TILE
    for tile in range(start, hi - TILE + 1, TILE):
        offs = tl.multiple_of(tile, 8) + lane
        A, SA, D, B, SB, E, C, SC = _statistics_tile(a, b, c, offs, lo, hi, k, A, SA, D, B, SB, E, C, SC,
                                                     HAS_C, DIFFERENCE, False)
    rest = start + tl.maximum((hi - start) // TILE, 0) * TILE
    if rest < hi:
        A, SA, D, B, SB, E, C, SC = _statistics_tile(a, b, c, rest + lane, lo, hi, k, A, SA, D, B, SB, E, C, SC,
                                                     HAS_C, DIFFERENCE, True)
    top_a = tl.max(A, 0)
    top_b = tl.max(B, 0)
    scale = tl.exp2(A - top_a)
    tl.store(out, top_a)
    tl.store(out + rows, tl.sum(SA * scale, 0))
    tl.store(out + 2 * rows, tl.sum(scale * (D + ((A - top_a) - (B - top_b)) * SA), 0))
    tl.store(out + 3 * rows, top_b)
    tl.store(out + 4 * rows, tl.sum(SB * tl.exp2(B - top_b), 0))
    if HAS_C:
        top_c = tl.max(C, 0)
        tl.store(out + 5 * rows, tl.sum(scale * (E + ((A - top_a) - (C - top_c)) * SA), 0))
        tl.store(out + 6 * rows, top_c)
        tl.store(out + 7 * rows, tl.sum(SC * tl.exp2(C - top_c), 0))


@triton.jit(do_not_specialize=["rows"])
def statistics_kernel(
    a_ptr, b_ptr, c_ptr,          # [N, V] any float type; c is read where HAS_C, and holds a - c where DIFFERENCE
    weights_ptr,                  # [N] float32; a row of weight 0 is not read
    out_ptr,                      # [P, K, N] float32, base 2: A, SA, D, B, SB (, E, C, SC)
    stride_a, stride_b, stride_c, rows, columns, split_columns,
    k,                            # log2(e) / temperature
    HAS_C: tl.constexpr, DIFFERENCE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ALIGNED: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr,
):
    K: tl.constexpr = 8 if HAS_C else 5
    row = tl.program_id(0)
    split = tl.program_id(1)
    out = out_ptr + split.to(tl.int64) * K * rows + row
    if HAS_WEIGHTS:  # noqa: SIM102, an `and` would load the weight in either case
        if tl.load(weights_ptr + row) == 0.0:
            for i in tl.static_range(K):
                tl.store(out + i * rows, 1.0 if i % 3 == 1 else 0.0)
            return
    a = row_start(a_ptr, row, stride_a, ALIGNED)
    b = row_start(b_ptr, row, stride_b, ALIGNED)
    c = row_start(c_ptr, row, stride_c, ALIGNED)
    start, lo, hi = slice_bounds(row, stride_a, split, columns, split_columns, ALIGNED)
    store_statistics(a, b, c, out, rows, start, lo, hi, k, HAS_C, DIFFERENCE, R, L)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_kernel(
    stats_ptr,  # [P, K, N] float32, of all splits of all ranks
    out_ptr,    # [K, N] float32: A, SA, B, SB (base 2), KL_ab (nats) (, C, SC, KL_ac)
    rows, parts, HAS_C: tl.constexpr, BLOCK: tl.constexpr,
):
    K: tl.constexpr = 8 if HAS_C else 5
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    top_a = tl.full((BLOCK,), NEG, tl.float32)
    top_b = tl.full((BLOCK,), NEG, tl.float32)
    top_c = tl.full((BLOCK,), NEG, tl.float32)
    for part in range(parts):
        stats = stats_ptr + part * (K * rows) + row
        top_a = tl.maximum(top_a, tl.load(stats, mask=ok, other=NEG))
        top_b = tl.maximum(top_b, tl.load(stats + 3 * rows, mask=ok, other=NEG))
        if HAS_C:
            top_c = tl.maximum(top_c, tl.load(stats + 6 * rows, mask=ok, other=NEG))
    sum_a = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    sum_c = tl.zeros((BLOCK,), tl.float32)
    D = tl.zeros((BLOCK,), tl.float32)
    E = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        stats = stats_ptr + part * (K * rows) + row
        shift_a = tl.load(stats, mask=ok, other=NEG) - top_a
        shift_b = tl.load(stats + 3 * rows, mask=ok, other=NEG) - top_b
        SA = tl.load(stats + rows, mask=ok, other=1.0)
        scale = tl.exp2(shift_a)
        sum_a += scale * SA
        sum_b += tl.exp2(shift_b) * tl.load(stats + 4 * rows, mask=ok, other=1.0)
        D += scale * (tl.load(stats + 2 * rows, mask=ok, other=0.0) + (shift_a - shift_b) * SA)
        if HAS_C:
            shift_c = tl.load(stats + 6 * rows, mask=ok, other=NEG) - top_c
            sum_c += tl.exp2(shift_c) * tl.load(stats + 7 * rows, mask=ok, other=1.0)
            E += scale * (tl.load(stats + 5 * rows, mask=ok, other=0.0) + (shift_a - shift_c) * SA)
    out = out_ptr + row
    tl.store(out, top_a, mask=ok)
    tl.store(out + rows, sum_a, mask=ok)
    tl.store(out + 2 * rows, top_b, mask=ok)
    tl.store(out + 3 * rows, sum_b, mask=ok)
    tl.store(out + 4 * rows, (D / sum_a - tl.log2(sum_a) + tl.log2(sum_b)) * LN2, mask=ok)
    if HAS_C:
        tl.store(out + 5 * rows, top_c, mask=ok)
        tl.store(out + 6 * rows, sum_c, mask=ok)
        tl.store(out + 7 * rows, (E / sum_a - tl.log2(sum_a) + tl.log2(sum_c)) * LN2, mask=ok)


@triton.jit
def _gradient_tile(a, b, c, grad_a, grad_b, offs, lo, hi, k, top_a, top_b, top_c, constant, coef, scale_a, scale_b,
                   HAS_C: tl.constexpr, DIFFERENCE: tl.constexpr, WANT_A: tl.constexpr, WANT_B: tl.constexpr,
                   MASKED: tl.constexpr):
    x = load_columns(a, offs, lo, hi, MASKED)
    u = tl.maximum(tl.fma(x, k, -top_a), NEG)
    v = tl.maximum(tl.fma(load_columns(b, offs, lo, hi, MASKED), k, -top_b), NEG)
    scaled_p = tl.exp2(u) * scale_a
    if HAS_C:
        z = load_columns(c, offs, lo, hi, MASKED)
        if DIFFERENCE:
            z = x - z
        w = tl.maximum(tl.fma(z, k, -top_c), NEG)
    if WANT_A:
        ratio = u - v
        if HAS_C:
            ratio = tl.fma(u - w, coef, ratio)
        store_columns(grad_a, offs, scaled_p * tl.fma(ratio, LN2, -constant), lo, hi, MASKED)
    if WANT_B:
        store_columns(grad_b, offs, tl.exp2(v) * scale_b - scaled_p, lo, hi, MASKED)


@triton.jit
def store_gradient(
    a, b, c, grad_a, grad_b, start, lo, hi, k, top_a, top_b, top_c, constant, coef, scale_a, scale_b,
    HAS_C: tl.constexpr, DIFFERENCE: tl.constexpr, WANT_A: tl.constexpr, WANT_B: tl.constexpr, BLOCK: tl.constexpr,
):
    """Read columns lo to hi of a row once more and write their gradients."""
    lane = tl.arange(0, BLOCK)
    if lo > start:
        _gradient_tile(a, b, c, grad_a, grad_b, start + lane, lo, hi, k, top_a, top_b, top_c, constant, coef, scale_a,
                       scale_b, HAS_C, DIFFERENCE, WANT_A, WANT_B, True)
        start += BLOCK
    for tile in range(start, hi - BLOCK + 1, BLOCK):
        _gradient_tile(a, b, c, grad_a, grad_b, tl.multiple_of(tile, 8) + lane, lo, hi, k, top_a, top_b, top_c, constant, coef,
                       scale_a, scale_b, HAS_C, DIFFERENCE, WANT_A, WANT_B, False)
    rest = start + tl.maximum((hi - start) // BLOCK, 0) * BLOCK
    if rest < hi:
        _gradient_tile(a, b, c, grad_a, grad_b, rest + lane, lo, hi, k, top_a, top_b, top_c, constant, coef, scale_a,
                       scale_b, HAS_C, DIFFERENCE, WANT_A, WANT_B, True)


@triton.jit
def gradient_kernel(
    a_ptr, b_ptr, c_ptr,                   # [N, V] as in statistics_kernel
    top_a_ptr, sum_a_ptr, top_b_ptr, sum_b_ptr, kl_ab_ptr, top_c_ptr, sum_c_ptr, kl_ac_ptr,    # [N] float32, from merge_kernel
    scale_ptr,                             # [N] float32; a row of scale 0 is not read and gets zeros
    coef_ptr,                              # one float32: the factor of KL_ac
    grad_a_ptr, grad_b_ptr,                # [N, V]; may be a and b themselves
    stride_a, stride_b, stride_c, stride_grad_a, stride_grad_b, columns, split_columns, k,
    HAS_C: tl.constexpr, DIFFERENCE: tl.constexpr, WANT_A: tl.constexpr, WANT_B: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    a = row_start(a_ptr, row, stride_a, ALIGNED)
    b = row_start(b_ptr, row, stride_b, ALIGNED)
    c = row_start(c_ptr, row, stride_c, ALIGNED)
    grad_a = row_start(grad_a_ptr, row, stride_grad_a, ALIGNED)
    grad_b = row_start(grad_b_ptr, row, stride_grad_b, ALIGNED)
    start, lo, hi = slice_bounds(row, stride_a, tl.program_id(1), columns, split_columns, ALIGNED)
    scale = tl.load(scale_ptr + row)
    if scale == 0.0:
        clear(grad_a, grad_b, start, lo, hi, WANT_A, WANT_B, BLOCK)
        return
    top_a = tl.load(top_a_ptr + row)
    top_b = tl.load(top_b_ptr + row)
    sum_a = tl.load(sum_a_ptr + row)
    sum_b = tl.load(sum_b_ptr + row)
    scale_a = scale / sum_a
    scale_b = scale / sum_b
    constant = tl.load(kl_ab_ptr + row) + (tl.log2(sum_a) - tl.log2(sum_b)) * LN2
    top_c = 0.0
    coef = 0.0
    if HAS_C:
        top_c = tl.load(top_c_ptr + row)
        coef = tl.load(coef_ptr)
        constant += coef * (tl.load(kl_ac_ptr + row) + (tl.log2(sum_a) - tl.log2(tl.load(sum_c_ptr + row))) * LN2)
    store_gradient(a, b, c, grad_a, grad_b, start, lo, hi, k, top_a, top_b, top_c, constant, coef, scale_a, scale_b,
                   HAS_C, DIFFERENCE, WANT_A, WANT_B, BLOCK)


# ------------------------------------------------------------------------------------------------------------ launches


def statistics(a_NV: Tensor, b_NV: Tensor, c_NV: Tensor | None = None, *, weights: Tensor | None = None,
               temperature: float = 1.0, difference: bool = False) -> Tensor:
    """[P, K, N] statistics of this shard's splits; see `rows.statistics`."""
    return _statistics_op(a_NV, b_NV, c_NV, weights, temperature, difference)


@torch.library.custom_op("megakd_kernels::kl_statistics", mutates_args=())
def _statistics_op(a: Tensor, b: Tensor, c: Tensor | None, weights: Tensor | None, temperature: float,
                   difference: bool) -> Tensor:
    R, L, of_32 = STATISTICS_TILE[5 if c is None else 8]
    rows, columns = a.shape
    splits, split_columns = split_over(a, R * L)
    out = a.new_empty(splits, 5 if c is None else 8, rows, dtype=torch.float32)
    with on_device_of(a):
        statistics_kernel[(rows, splits)](
            a, b, a if c is None else c, out if weights is None else weights, out, a.stride(0), b.stride(0),
            a.stride(0) if c is None else c.stride(0), rows, columns, split_columns, LOG2E / temperature,
            HAS_C=c is not None, DIFFERENCE=difference, HAS_WEIGHTS=weights is not None, ALIGNED=aligned(a, b, c), R=R, L=L,
            num_warps=warps(of_32))
    return out


@_statistics_op.register_fake
def _(a, b, c, weights, temperature, difference):
    splits, _ = split_over(a, 1)
    return a.new_empty(splits, 5 if c is None else 8, a.shape[0], dtype=torch.float32)


def merge(stats_PKN: Tensor) -> Merged:
    """The statistics of all parts of the vocabulary as one; maxima in base 2, divergences in nats."""
    return Merged(*_merge_op(stats_PKN).unbind(0))


@torch.library.custom_op("megakd_kernels::kl_merge", mutates_args=())
def _merge_op(stats: Tensor) -> Tensor:
    parts, K, rows = stats.shape
    out = stats.new_empty(K, rows)
    with on_device_of(stats):
        merge_kernel[(triton.cdiv(rows, MERGE_BLOCK),)](
            stats, out, rows, parts, HAS_C=K == 8, BLOCK=MERGE_BLOCK, num_warps=warps(MERGE_WARPS))
    return out


@_merge_op.register_fake
def _(stats):
    return stats.new_empty(stats.shape[1:])


def gradient(a_NV: Tensor, b_NV: Tensor, c_NV: Tensor | None, merged: Merged, scale_N: Tensor, *, temperature: float = 1.0,
             coef: float | Tensor = 0.0, difference: bool = False, grad_a: Tensor | None = None,
             grad_b: Tensor | None = None) -> None:
    """Write the gradients into grad_a and grad_b; see `rows.gradient`."""
    if not isinstance(coef, Tensor):
        coef = torch.full((), coef, dtype=torch.float32, device=a_NV.device)  # filled on the device: nobody waits
    _gradient_op(a_NV, b_NV, c_NV, *merged, scale_N.float().contiguous(), coef.float(), temperature, difference, grad_a, grad_b)


@torch.library.custom_op("megakd_kernels::kl_gradient", mutates_args=("grad_a", "grad_b"))
def _gradient_op(a: Tensor, b: Tensor, c: Tensor | None, top_a: Tensor, sum_a: Tensor, top_b: Tensor, sum_b: Tensor,
                 kl_ab: Tensor, top_c: Tensor | None, sum_c: Tensor | None, kl_ac: Tensor | None, scale: Tensor, coef: Tensor,
                 temperature: float, difference: bool, grad_a: Tensor | None, grad_b: Tensor | None) -> None:
    rows, columns = a.shape
    splits, split_columns = split_over(a, GRADIENT_BLOCK)
    third = (a, top_a, sum_a, kl_ab) if c is None else (c, top_c, sum_c, kl_ac)
    ga, gb = (a if g is None else g for g in (grad_a, grad_b))
    with on_device_of(a):
        gradient_kernel[(rows, splits)](
            a, b, third[0], top_a, sum_a, top_b, sum_b, kl_ab, *third[1:], scale, coef, ga, gb, a.stride(0), b.stride(0),
            third[0].stride(0), ga.stride(0), gb.stride(0), columns, split_columns, LOG2E / temperature, HAS_C=c is not None,
            DIFFERENCE=difference, WANT_A=grad_a is not None, WANT_B=grad_b is not None,
            ALIGNED=aligned(a, b, c, grad_a, grad_b), BLOCK=GRADIENT_BLOCK, num_warps=warps(GRADIENT_WARPS))


@_gradient_op.register_fake
def _(*args):
    return None
