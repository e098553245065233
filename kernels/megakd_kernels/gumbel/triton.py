"""The highest score z_v / T + g_v of each row, and its column: noise, sum and maximum in one reading of the logits, on a GPU.

    g_v = -log E_v,    E_v = -log(1 - u_v),    u_v = (31 bits of hash(key, token id v) + 1/2) / 2^31,    key = hash(stream, position)

What is hashed, and how, is megakd.generation.sampling's, of which this is the one launch in place of some forty. B rows, V columns here,
P splits of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_rows import on_device_of

BLOCK, WARPS = 1024, 4
SPLIT_COLUMNS = 8192  # of one program
MERGED = 128  # splits, at most: a million columns

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_SECOND = tl.constexpr(0x94D049BB133111EB - 2**64)
_BITS31 = tl.constexpr(0x7FFFFFFF)


@triton.jit
def mix64(x):
    """splitmix64's finalizer; >> on int64 copies the sign, which is masked out."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def log1p(x):
    """log(1 + x) to the last bit or two, of small x too: what 1 + x rounds away is put back as a factor."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / (y - 1.0)))


@triton.jit
def gumbel(key, token):
    """Noise of token ids (int32) under a row's key (int64)."""
    x = token ^ (key & _BITS31).to(tl.int32)
    x = (((x ^ (x >> 16)) * 0x21F0AAAD) & _BITS31) ^ ((key >> 31) & _BITS31).to(tl.int32)
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _BITS31
    u = (x ^ (x >> 15)).to(tl.float32)
    return -tl.log(-log1p(u * -4.656612873077393e-10 - 2.3283064365386963e-10))  # -2^-31 u - 2^-32


@triton.jit(do_not_specialize=["first_token"])
def scores_kernel(
    logits_ptr,    # [B, V] any float type
    streams_ptr,   # [B] int64
    position_ptr,  # [1] int64
    score_ptr,     # [P, B] float32: the highest of a split, infinite where a logit is NaN or infinite
    column_ptr,    # [P, B] int64: the first column that has it
    stride, columns, first_token, temperature, split_columns, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    key = mix64(tl.load(streams_ptr + row) + (tl.load(position_ptr) + 1) * _GAMMA)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32) + split * split_columns
    end = tl.minimum(columns, (split + 1) * split_columns)
    for tile in range(split * split_columns, end, BLOCK):
        column = tile + tl.arange(0, BLOCK)
        z = tl.load(logits_ptr + row * stride + column, mask=column < end, other=float("-inf")).to(tl.float32)
        score = z / temperature + gumbel(key, (first_token + column).to(tl.int32))
        score = tl.where(score < float("inf"), score, float("inf"))  # NaN too
        higher = score > best
        best = tl.where(higher, score, best)
        at = tl.where(higher, column, at)
    top = tl.max(best, 0)
    out = split.to(tl.int64) * tl.num_programs(0) + row
    tl.store(score_ptr + out, top)
    tl.store(column_ptr + out, tl.min(tl.where(best == top, at, 2147483647), 0).to(tl.int64))


@triton.jit(do_not_specialize=["rows", "splits", "first_token"])
def merge_kernel(
    score_ptr, column_ptr,  # [P, B] of scores_kernel
    best_ptr,               # [B] float32
    token_ptr,              # [B] int64: first_token + column, or no_token where the best is no number
    rows, splits, first_token, no_token, MERGED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, MERGED)
    score = tl.load(score_ptr + part * rows + row, mask=part < splits, other=float("-inf"))
    column = tl.load(column_ptr + part * rows + row, mask=part < splits, other=9223372036854775807)
    top = tl.max(score, 0)
    token = first_token + tl.min(tl.where(score == top, column, 9223372036854775807), 0)
    tl.store(best_ptr + row, top)
    tl.store(token_ptr + row, tl.where(top < float("inf"), token, no_token))


@torch.library.custom_op("megakd_kernels::draw", mutates_args=())
def draw(logits: Tensor, streams: Tensor, position: Tensor, temperature: float, columns: int, first_token: int,
         no_token: int) -> tuple[Tensor, Tensor]:
    """The highest score [B] float32 of the first `columns` of each row, and its token id [B]; `no_token` where one is no number."""
    rows, splits = len(logits), max(1, triton.cdiv(columns, SPLIT_COLUMNS))
    scores = logits.new_empty(splits, rows, dtype=torch.float32)
    columns_of = torch.empty_like(scores, dtype=torch.int64)
    best, token = torch.empty_like(scores[0]), torch.empty_like(columns_of[0])
    with on_device_of(logits):
        scores_kernel[(rows, splits)](logits, streams, position, scores, columns_of, logits.stride(0), columns, first_token, temperature,
                                      SPLIT_COLUMNS, BLOCK=BLOCK, num_warps=WARPS)
        merge_kernel[(rows,)](scores, columns_of, best, token, rows, splits, first_token, no_token, MERGED=MERGED, num_warps=1)
    return best, token


@draw.register_fake
def _(logits, streams, position, temperature, columns, first_token, no_token):
    return logits.new_empty(len(logits), dtype=torch.float32), streams.new_empty(len(logits))
