"""Reverse and forward KL and the prompt loss on one GPU, loss and gradient in one launch: each logit is read once from memory.

The two passes of `kl.triton` read every logit twice. Here persistent programs draw tickets in order. Ticket t stands for the
statistics of slice t of the logits and then for the gradient of slice t - lag, which should still be in the second-level cache:

    tickets    0 ... lag - 1       lag ... items - 1               items ... items + lag - 1
               statistics of t     statistics of t, gradient of    gradient of t - lag
                                   t - lag

The gradient of a slice needs the statistics of its whole row. Waiting for them cannot block for ever: lag is at least a row's
slices, so they have smaller tickets, whose holders are running and never wait before their own statistics are written. They are
handed over by a counter a row: each writer adds one with release order after all its threads have stored, the reader spins on it
with acquire order and reads past the first-level cache.

An option, `with launch.use("single_launch")`: it equals the others in Triton's interpreter, where programs run one after another,
and has not yet run on a GPU. Mixtures and several ranks take the two passes. The gradient exists from forward on, made and rounded
for an upstream gradient of one; backward multiplies the rows whose upstream is another number, which reads and writes them once
more and rounds a second time, and can run once. So factors belong into `weights`, and float16 with a loss scale elsewhere.

N rows, V columns, K statistics (5 or 8), S slices of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kl import triton as kl_triton
from ..kl.triton import gradient, merge, statistics, store_gradient, store_statistics
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
    store_columns,
)

__all__ = ["gradient", "loss_and_gradient", "merge", "scale_rows", "statistics"]
READS_ONCE = True
BLOCK, WARPS = 1024, 4  # of the gradient: as many warps as the statistics' tile has
SCALE_BLOCK, SCALE_WARPS = 2048, 8
INTERPRETED_PROGRAMS = 4


@triton.jit
def _merged_row(stats, stride, parts, slices, HAS_C: tl.constexpr):
    """(A, SA, B, SB, KL_ab, C, SC, KL_ac) of a row from its slices' statistics; the divergences in nats."""
    K: tl.constexpr = 8 if HAS_C else 5
    ok = parts < slices
    stats += parts.to(tl.int64) * (K * stride)
    shift_a = tl.load(stats, mask=ok, other=NEG, cache_modifier=".cg")
    shift_b = tl.load(stats + 3 * stride, mask=ok, other=NEG, cache_modifier=".cg")
    top_a = tl.max(shift_a, 0)
    top_b = tl.max(shift_b, 0)
    shift_a -= top_a
    shift_b -= top_b
    SA = tl.load(stats + stride, mask=ok, other=0.0, cache_modifier=".cg")
    scale = tl.exp2(shift_a)
    sum_a = tl.sum(scale * SA, 0)
    sum_b = tl.sum(tl.exp2(shift_b) * tl.load(stats + 4 * stride, mask=ok, other=0.0, cache_modifier=".cg"), 0)
    D = tl.load(stats + 2 * stride, mask=ok, other=0.0, cache_modifier=".cg")
    kl_ab = (tl.sum(scale * (D + (shift_a - shift_b) * SA), 0) / sum_a - tl.log2(sum_a) + tl.log2(sum_b)) * LN2
    top_c = 0.0
    sum_c = 1.0
    kl_ac = 0.0
    if HAS_C:
        shift_c = tl.load(stats + 6 * stride, mask=ok, other=NEG, cache_modifier=".cg")
        top_c = tl.max(shift_c, 0)
        shift_c -= top_c
        sum_c = tl.sum(tl.exp2(shift_c) * tl.load(stats + 7 * stride, mask=ok, other=0.0, cache_modifier=".cg"), 0)
        E = tl.load(stats + 5 * stride, mask=ok, other=0.0, cache_modifier=".cg")
        kl_ac = (tl.sum(scale * (E + (shift_a - shift_c) * SA), 0) / sum_a - tl.log2(sum_a) + tl.log2(sum_c)) * LN2
    return top_a, sum_a, top_b, sum_b, kl_ab, top_c, sum_c, kl_ac


@triton.jit
def loss_and_gradient_kernel(
    a_ptr, b_ptr, c_ptr,       # [N, V] as in kl.triton.statistics_kernel
    scale_ptr,                 # [N] float32, weight / temperature; a row of scale 0 is not read and gets zeros
    coef_ptr,                  # one float32: the factor of KL_ac
    stats_ptr,                 # [S, K, N] float32, scratch
    ticket_ptr,                # one int32, zero: the next ticket
    done_ptr,                  # [N] int32, zeros: slices of a row whose statistics are written
    out_ptr,                   # [2, N] float32, nats: KL_ab, KL_ac
    grad_a_ptr, grad_b_ptr,    # [N, V]; may be a and b themselves
    stride_a, stride_b, stride_c, stride_grad_a, stride_grad_b, rows, columns, slices, slice_columns, lag, k,
    HAS_C: tl.constexpr, DIFFERENCE: tl.constexpr, WANT_A: tl.constexpr, WANT_B: tl.constexpr, ALIGNED: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):
    K: tl.constexpr = 8 if HAS_C else 5
    items = rows * slices
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    while ticket < items + lag:
        if ticket < items:
            row = ticket // slices
            part = ticket % slices
            if tl.load(scale_ptr + row) != 0.0:
                a = row_start(a_ptr, row, stride_a, ALIGNED)
                b = row_start(b_ptr, row, stride_b, ALIGNED)
                c = row_start(c_ptr, row, stride_c, ALIGNED)
                start, lo, hi = slice_bounds(row, stride_a, part, columns, slice_columns, ALIGNED)
                out = stats_ptr + part.to(tl.int64) * K * rows + row
                store_statistics(a, b, c, out, rows, start, lo, hi, k, HAS_C, DIFFERENCE, R, L)
                tl.debug_barrier()  # all threads' numbers before the counter that publishes them
                tl.atomic_add(done_ptr + row, 1, sem="release")
        if ticket >= lag:
            row = (ticket - lag) // slices
            part = (ticket - lag) % slices
            a = row_start(a_ptr, row, stride_a, ALIGNED)
            b = row_start(b_ptr, row, stride_b, ALIGNED)
            c = row_start(c_ptr, row, stride_c, ALIGNED)
            grad_a = row_start(grad_a_ptr, row, stride_grad_a, ALIGNED)
            grad_b = row_start(grad_b_ptr, row, stride_grad_b, ALIGNED)
            start, lo, hi = slice_bounds(row, stride_a, part, columns, slice_columns, ALIGNED)
            scale = tl.load(scale_ptr + row)
            if scale == 0.0:
                clear(grad_a, grad_b, start, lo, hi, WANT_A, WANT_B, BLOCK)
            else:
                while tl.atomic_add(done_ptr + row, 0, sem="acquire") < slices:
                    pass
                tl.debug_barrier()
                top_a, sum_a, top_b, sum_b, kl_ab, top_c, sum_c, kl_ac = _merged_row(
                    stats_ptr + row, rows, tl.arange(0, PARTS), slices, HAS_C)
                if part == 0:
                    tl.store(out_ptr + row, kl_ab)
                    tl.store(out_ptr + rows + row, kl_ac)
                constant = kl_ab + (tl.log2(sum_a) - tl.log2(sum_b)) * LN2
                coef = 0.0
                if HAS_C:
                    coef = tl.load(coef_ptr)
                    constant += coef * (kl_ac + (tl.log2(sum_a) - tl.log2(sum_c)) * LN2)
                store_gradient(a, b, c, grad_a, grad_b, start, lo, hi, k, top_a, top_b, top_c, constant, coef, scale / sum_a,
                               scale / sum_b, HAS_C, DIFFERENCE, WANT_A, WANT_B, BLOCK)
        ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")


@triton.jit
def scale_rows_kernel(x_ptr, scale_ptr, stride, columns, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """x[row] *= scale[row]; a row of scale 1 is left alone, and one of scale 0 is zeros whatever it held."""
    row = tl.program_id(0)
    scale = tl.load(scale_ptr + row)
    if scale == 1.0:
        return
    x = row_start(x_ptr, row, stride, ALIGNED)
    _, lo, hi = slice_bounds(row, stride, 0, columns, columns + 7, ALIGNED)
    if scale == 0.0:
        clear(x, x, 0, lo, hi, True, False, BLOCK)
        return
    for tile in range(0, hi, BLOCK):
        offs = tl.multiple_of(tile, 8) + tl.arange(0, BLOCK)
        if (tile >= lo) & (tile + BLOCK <= hi):
            store_columns(x, offs, load_columns(x, offs, lo, hi, False) * scale, lo, hi, False)
        else:
            store_columns(x, offs, load_columns(x, offs, lo, hi, True) * scale, lo, hi, True)


def loss_and_gradient(a_NV: Tensor, b_NV: Tensor, c_NV: Tensor | None, scale_N: Tensor, *, temperature: float = 1.0,
                      coef: float | Tensor = 0.0, difference: bool = False, grad_a: Tensor | None = None,
                      grad_b: Tensor | None = None) -> Tensor:
    """[2, N] KL(a || b) and KL(a || c) in nats; the gradients of KL_ab + coef KL_ac times scale_N go into grad_a and grad_b.

    The arguments are those of `kl.rows.gradient`. Rows of scale 0 are not read: their divergences are 0.
    """
    if not isinstance(coef, Tensor):
        coef = torch.full((), coef, dtype=torch.float32, device=a_NV.device)
    return _loss_and_gradient_op(a_NV, b_NV, c_NV, scale_N.float().contiguous(), coef.float(), temperature, difference, grad_a,
                                 grad_b)


@torch.library.custom_op("megakd_kernels::kl_loss_and_gradient", mutates_args=("grad_a", "grad_b"))
def _loss_and_gradient_op(a: Tensor, b: Tensor, c: Tensor | None, scale: Tensor, coef: Tensor, temperature: float,
                          difference: bool, grad_a: Tensor | None, grad_b: Tensor | None) -> Tensor:
    rows, columns = a.shape
    K = 5 if c is None else 8
    R, L, _ = kl_triton.STATISTICS_TILE[K]
    slices = max(1, triton.cdiv(columns + 7, R * L))
    programs = resident_programs(a.device, difference)
    lag = 2 * programs + slices
    assert rows * slices + lag + programs < 2**31, "tickets are 32-bit"
    third = a if c is None else c
    ga, gb = (a if g is None else g for g in (grad_a, grad_b))
    out = a.new_zeros(2, rows, dtype=torch.float32)
    counters = a.new_zeros(1 + rows, dtype=torch.int32)
    with on_device_of(a):
        loss_and_gradient_kernel[(programs,)](
            a, b, third, scale, coef, a.new_empty(slices, K, rows, dtype=torch.float32), counters, counters[1:], out, ga, gb,
            a.stride(0), b.stride(0), third.stride(0), ga.stride(0), gb.stride(0), rows, columns, slices, R * L, lag,
            LOG2E / temperature, HAS_C=c is not None, DIFFERENCE=difference, WANT_A=grad_a is not None, WANT_B=grad_b is not None,
            ALIGNED=aligned(a, b, c, grad_a, grad_b), R=R, L=L, BLOCK=BLOCK, PARTS=max(2, triton.next_power_of_2(slices)),
            num_warps=WARPS)
    return out


@_loss_and_gradient_op.register_fake
def _(a, *args):
    return a.new_empty(2, a.shape[0], dtype=torch.float32)


def resident_programs(device: torch.device, difference: bool) -> int:
    """As many as run at once, by registers; more would be right and slower."""
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    return (2 if difference else 3) * torch.cuda.get_device_properties(device).multi_processor_count


def scale_rows(x_NV: Tensor, scale_N: Tensor) -> None:
    """x times scale, in place."""
    _scale_rows_op(x_NV, scale_N.float().contiguous())


@torch.library.custom_op("megakd_kernels::scale_rows", mutates_args=("x",))
def _scale_rows_op(x: Tensor, scale: Tensor) -> None:
    with on_device_of(x):
        scale_rows_kernel[(x.shape[0],)](x, scale, x.stride(0), x.shape[1], ALIGNED=aligned(x), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS)


@_scale_rows_op.register_fake
def _(x, scale):
    return None
