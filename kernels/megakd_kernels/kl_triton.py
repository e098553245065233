"""Divergences on a GPU: each logit is read once for the statistics and once for the gradient, and nothing else is of its size.

The mathematics are those of `kl_rows`, in base 2: u = k a - A with k = log2(e) / T, so that an exponential is one instruction.
A program walks one row, or one of its splits, in tiles [R, L]. A tile is reduced over R inside each thread, and the L lanes keep
private statistics, so that nothing crosses a warp before the row ends. Rows of an odd width (V = 50257) start at any address: the
first numbers are peeled off up to a 16-byte boundary, and all other loads are 128 bits wide. Only the first and the last tile are
masked. Registers, spills and widths for sm_90 are held by tests/kernel_tests/test_sm90.py.

N rows, V columns here, K statistics (5 or 8), P partial statistics (splits, then ranks).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kl_rows import Merged
from .shards import FLOOR

READS_ONCE = False  # `kl_single_launch` does
LOG2E = math.log2(math.e)
LN2 = tl.constexpr(math.log(2.0))
NEG = tl.constexpr(FLOOR)
SPLITS_WANTED = 8 * 132  # programs that fill an H200; fewer rows than that are split over the vocabulary
STATISTICS_TILE = {5: (4, 1024, 4), 8: (2, 1024, 4)}  # K: R, L, warps. Three tensors at R = 4 take all 255 registers
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 8
MIXTURE_BLOCK, MIXTURE_WARPS = 2048, 8
SKEW, JSD, TVD = 0, 1, 2
OPS = {"jsd": JSD, "tvd": TVD}  # of an objective; the others are skewed KLs
_JSD, _TVD = tl.constexpr(JSD), tl.constexpr(TVD)


@triton.jit
def load_columns(ptr, offs, lo, hi, MASKED: tl.constexpr):
    """float32; where MASKED, columns outside lo..hi are -inf and not read."""
    if MASKED:
        return tl.load(ptr + offs, mask=(offs >= lo) & (offs < hi), other=float("-inf")).to(tl.float32)
    else:
        return tl.load(ptr + offs).to(tl.float32)


@triton.jit
def store_columns(ptr, offs, value, lo, hi, MASKED: tl.constexpr):
    """Rounded to the tensor's type; where MASKED, columns outside lo..hi stay as they are."""
    if MASKED:
        tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=(offs >= lo) & (offs < hi))
    else:
        tl.store(ptr + offs, value.to(ptr.dtype.element_ty))


@triton.jit
def row_start(ptr, row, stride, ALIGNED: tl.constexpr):
    """The row's address, moved back to a 16-byte boundary where ALIGNED."""
    offset = row.to(tl.int64) * stride
    if ALIGNED:
        offset = tl.multiple_of((offset // 8) * 8, 8)
    return ptr + offset


@triton.jit
def slice_bounds(row, stride, split, columns, split_columns, ALIGNED: tl.constexpr):
    """(start, first, end) of a split: it reads tiles from start, of which numbers before first belong to another row."""
    head = 0
    if ALIGNED:
        head = ((row.to(tl.int64) * stride) % 8).to(tl.int32)
    start = split * split_columns
    return start, tl.maximum(start, head), tl.minimum(start + split_columns, columns + head)


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


@triton.jit
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


@triton.jit
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
def clear(grad_a, grad_b, start, lo, hi, WANT_A: tl.constexpr, WANT_B: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in columns lo..hi of the gradients that are wanted."""
    for tile in range(start, hi, BLOCK):
        offs = tl.multiple_of(tile, 8) + tl.arange(0, BLOCK)
        if WANT_A:
            store_columns(grad_a, offs, tl.zeros((BLOCK,), tl.float32), lo, hi, True)
        if WANT_B:
            store_columns(grad_b, offs, tl.zeros((BLOCK,), tl.float32), lo, hi, True)


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


@triton.jit
def mixture_sums_kernel(
    q_ptr, p_ptr,              # [N, V]: the roles of `kl_rows` (exchanged by the caller for skew_reverse_kl)
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


def aligned(*tensors_NV: Tensor | None) -> bool:
    """Whether all rows of the same index start at the same place between two 16-byte boundaries."""
    given = [x for x in tensors_NV if x is not None]
    if any(x.stride(1) != 1 for x in given if x.shape[1] > 1):
        raise ValueError("the logits of one row must lie side by side in memory: pass logits.contiguous()")
    return len({x.stride(0) % 8 for x in given}) == 1 and all(x.data_ptr() % 16 == 0 for x in given)


def split_over(rows: int, columns: int, tile: int) -> tuple[int, int]:
    """(splits, columns a split). The number of splits depends on the rows only: ranks with other widths make as many."""
    splits = min(16, max(1, triton.cdiv(SPLITS_WANTED, max(1, rows))))
    return splits, max(1, triton.cdiv(triton.cdiv(columns + 7, splits), tile)) * tile


def statistics(a_NV: Tensor, b_NV: Tensor, c_NV: Tensor | None = None, *, weights: Tensor | None = None,
               temperature: float = 1.0, difference: bool = False) -> Tensor:
    """[P, K, N] statistics of this shard's splits; see `kl_rows.statistics`."""
    return _statistics_op(a_NV, b_NV, c_NV, weights, temperature, difference)


@torch.library.custom_op("megakd_kernels::kl_statistics", mutates_args=())
def _statistics_op(a: Tensor, b: Tensor, c: Tensor | None, weights: Tensor | None, temperature: float,
                   difference: bool) -> Tensor:
    R, L, warps = STATISTICS_TILE[5 if c is None else 8]
    rows, columns = a.shape
    splits, split_columns = split_over(rows, columns, R * L)
    out = a.new_empty(splits, 5 if c is None else 8, rows, dtype=torch.float32)
    statistics_kernel[(rows, splits)](
        a, b, a if c is None else c, out if weights is None else weights, out, a.stride(0), b.stride(0),
        a.stride(0) if c is None else c.stride(0), rows, columns, split_columns, LOG2E / temperature,
        HAS_C=c is not None, DIFFERENCE=difference, HAS_WEIGHTS=weights is not None, ALIGNED=aligned(a, b, c), R=R, L=L,
        num_warps=warps)
    return out


@_statistics_op.register_fake
def _(a, b, c, weights, temperature, difference):
    splits, _ = split_over(a.shape[0], a.shape[1], 1)
    return a.new_empty(splits, 5 if c is None else 8, a.shape[0], dtype=torch.float32)


def merge(stats_PKN: Tensor) -> Merged:
    """The statistics of all parts of the vocabulary as one; maxima in base 2, divergences in nats."""
    return Merged(*_merge_op(stats_PKN).unbind(0))


@torch.library.custom_op("megakd_kernels::kl_merge", mutates_args=())
def _merge_op(stats: Tensor) -> Tensor:
    parts, K, rows = stats.shape
    out = stats.new_empty(K, rows)
    merge_kernel[(triton.cdiv(rows, 128),)](stats, out, rows, parts, HAS_C=K == 8, BLOCK=128, num_warps=4)
    return out


@_merge_op.register_fake
def _(stats):
    return stats.new_empty(stats.shape[1:])


def gradient(a_NV: Tensor, b_NV: Tensor, c_NV: Tensor | None, merged: Merged, scale_N: Tensor, *, temperature: float = 1.0,
             coef: float | Tensor = 0.0, difference: bool = False, grad_a: Tensor | None = None,
             grad_b: Tensor | None = None) -> None:
    """Write the gradients into grad_a and grad_b; see `kl_rows.gradient`."""
    if not isinstance(coef, Tensor):
        coef = torch.full((), coef, dtype=torch.float32, device=a_NV.device)  # filled on the device: nobody waits
    _gradient_op(a_NV, b_NV, c_NV, *merged, scale_N.float().contiguous(), coef.float(), temperature, difference, grad_a, grad_b)


@torch.library.custom_op("megakd_kernels::kl_gradient", mutates_args=("grad_a", "grad_b"))
def _gradient_op(a: Tensor, b: Tensor, c: Tensor | None, top_a: Tensor, sum_a: Tensor, top_b: Tensor, sum_b: Tensor,
                 kl_ab: Tensor, top_c: Tensor | None, sum_c: Tensor | None, kl_ac: Tensor | None, scale: Tensor, coef: Tensor,
                 temperature: float, difference: bool, grad_a: Tensor | None, grad_b: Tensor | None) -> None:
    rows, columns = a.shape
    splits, split_columns = split_over(rows, columns, GRADIENT_BLOCK)
    third = (a, top_a, sum_a, kl_ab) if c is None else (c, top_c, sum_c, kl_ac)
    ga, gb = (a if g is None else g for g in (grad_a, grad_b))
    gradient_kernel[(rows, splits)](
        a, b, third[0], top_a, sum_a, top_b, sum_b, kl_ab, *third[1:], scale, coef, ga, gb, a.stride(0), b.stride(0),
        third[0].stride(0), ga.stride(0), gb.stride(0), columns, split_columns, LOG2E / temperature, HAS_C=c is not None,
        DIFFERENCE=difference, WANT_A=grad_a is not None, WANT_B=grad_b is not None,
        ALIGNED=aligned(a, b, c, grad_a, grad_b), BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS)


@_gradient_op.register_fake
def _(*args):
    return None


def _mixture_roles(student, teacher, objective: str) -> tuple:
    """skew_reverse_kl is skew_forward_kl with the models exchanged."""
    return (teacher, student) if objective == "skew_reverse_kl" else (student, teacher)


def _mixture_rows(merged: Merged, objective: str) -> tuple[Tensor, ...]:
    q, p = _mixture_roles((merged.top_a, merged.sum_a), (merged.top_b, merged.sum_b), objective)
    return (*q, *p)


def mixture_sums(q_NV: Tensor, p_NV: Tensor, merged: Merged, *, objective: str, share: float, weights: Tensor | None = None,
                 temperature: float = 1.0) -> Tensor:
    """[2, N]: x and y of this shard; see `kl_rows.mixture_sums`."""
    q_NV, p_NV = _mixture_roles(q_NV, p_NV, objective)
    return _mixture_sums_op(q_NV, p_NV, *_mixture_rows(merged, objective), weights, OPS.get(objective, SKEW), share, temperature)


@torch.library.custom_op("megakd_kernels::mixture_sums", mutates_args=())
def _mixture_sums_op(q: Tensor, p: Tensor, top_q: Tensor, sum_q: Tensor, top_p: Tensor, sum_p: Tensor, weights: Tensor | None,
                     op: int, share: float, temperature: float) -> Tensor:
    rows, columns = q.shape
    splits, split_columns = split_over(rows, columns, MIXTURE_BLOCK)
    out = q.new_empty(splits, 2, rows, dtype=torch.float32)
    mixture_sums_kernel[(rows, splits)](
        q, p, top_q, sum_q, top_p, sum_p, out if weights is None else weights, out, q.stride(0), p.stride(0), rows, columns,
        split_columns, LOG2E / temperature, math.log2(share), math.log2(1 - share), OP=op, HAS_WEIGHTS=weights is not None,
        ALIGNED=aligned(q, p), BLOCK=MIXTURE_BLOCK, num_warps=MIXTURE_WARPS)
    return out.sum(0)


@_mixture_sums_op.register_fake
def _(q, p, top_q, sum_q, top_p, sum_p, weights, op, share, temperature):
    return q.new_empty(2, q.shape[0], dtype=torch.float32)


def mixture_gradient(q_NV: Tensor, p_NV: Tensor, merged: Merged, sums_2N: Tensor, scale_N: Tensor, *, objective: str,
                     share: float, temperature: float = 1.0, grad_q: Tensor | None = None, grad_p: Tensor | None = None) -> None:
    """Write the gradients into grad_q (student) and grad_p (teacher); see `kl_rows.mixture_gradient`."""
    q_NV, p_NV = _mixture_roles(q_NV, p_NV, objective)
    grad_q, grad_p = _mixture_roles(grad_q, grad_p, objective)
    _mixture_gradient_op(q_NV, p_NV, *_mixture_rows(merged, objective), *sums_2N.unbind(0), scale_N.float().contiguous(),
                         OPS.get(objective, SKEW), share, temperature, grad_q, grad_p)


@torch.library.custom_op("megakd_kernels::mixture_gradient", mutates_args=("grad_q", "grad_p"))
def _mixture_gradient_op(q: Tensor, p: Tensor, top_q: Tensor, sum_q: Tensor, top_p: Tensor, sum_p: Tensor, x: Tensor,
                         y: Tensor, scale: Tensor, op: int, share: float, temperature: float, grad_q: Tensor | None,
                         grad_p: Tensor | None) -> None:
    rows, columns = q.shape
    splits, split_columns = split_over(rows, columns, MIXTURE_BLOCK)
    gq, gp = (q if g is None else g for g in (grad_q, grad_p))
    mixture_gradient_kernel[(rows, splits)](
        q, p, top_q, sum_q, top_p, sum_p, x, y, scale, gq, gp, q.stride(0), p.stride(0), gq.stride(0), gp.stride(0), columns,
        split_columns, LOG2E / temperature, share, math.log2(share), math.log2(1 - share), OP=op, WANT_Q=grad_q is not None,
        WANT_P=grad_p is not None, ALIGNED=aligned(q, p, grad_q, grad_p), BLOCK=MIXTURE_BLOCK, num_warps=MIXTURE_WARPS)


@_mixture_gradient_op.register_fake
def _(*args):
    return None
