"""Embedding lookup, soft prompt and positions in one pass over the output; the mathematics are in `operator`.

B batch, S tokens, P prompt rows, T = P + S, H hidden size, Vp rows of the word table on this rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shards import VocabShard
from ..triton_rows import on_device_of, warps

BLOCK, WARPS = 1024, 4


@triton.jit(do_not_specialize=["S", "P", "stride_tokens", "stride_ids"])
def embed_kernel(
    tokens_ptr,             # [B, S] int64, indices of the whole vocabulary
    word_ptr,               # [Vp, H] any float type
    prompt_ptr,             # [P, H] any float type
    position_ptr,           # [positions, H], read where HAS_POSITIONS
    position_ids_ptr,       # [B, T] int64, read where HAS_IDS; else positions count from 0
    out_ptr,                # [B, T, H]; zeros where another rank holds the row
    S, P, H, first_row, last_row, stride_tokens, stride_ids,
    HAS_POSITIONS: tl.constexpr, HAS_IDS: tl.constexpr, OWNS_PROMPT: tl.constexpr, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch = row // (P + S)
    i = row % (P + S)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < H
    x = tl.zeros((BLOCK,), tl.float32)
    mine = False
    if i < P:
        if OWNS_PROMPT:
            x = tl.load(prompt_ptr + i * H + column, mask=ok, other=0.0).to(tl.float32)
            mine = True
    else:
        token = tl.load(tokens_ptr + batch * stride_tokens + (i - P)).to(tl.int64)
        if (token >= first_row) & (token < last_row):
            x = tl.load(word_ptr + (token - first_row) * H + column, mask=ok, other=0.0).to(tl.float32)
            mine = True
    if HAS_POSITIONS:  # noqa: SIM102, the first `if` is decided when the kernel is compiled
        if mine:
            position = i
            if HAS_IDS:
                position = tl.load(position_ids_ptr + batch * stride_ids + i).to(tl.int64)
            x += tl.load(position_ptr + position * H + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * H + column, x.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["B", "T"])
def prompt_gradient_kernel(
    grad_ptr,  # [B, T, H] any float type
    out_ptr,   # [P, H] float32
    B, T, H, BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for batch in range(B):
        total += tl.load(grad_ptr + (batch * T + row) * H + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * H + column, total, mask=ok)


def embed(tokens_BS: Tensor, word_VH: Tensor, prompt_PH: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, *,
          shard: VocabShard) -> Tensor:
    """[B, T, H]: this rank's rows, zeros elsewhere."""
    if position_ids is not None:
        position_ids = position_ids.expand(tokens_BS.shape[0], -1)
    return _embed_op(tokens_BS, word_VH.contiguous(), prompt_PH.contiguous(), position_weight, position_ids,
                     shard.start(len(word_VH)), shard.rank == 0)


@torch.library.custom_op("megakd_kernels::prompt_embedding", mutates_args=())
def _embed_op(tokens: Tensor, word: Tensor, prompt: Tensor, position: Tensor | None, ids: Tensor | None, first_row: int,
              owns_prompt: bool) -> Tensor:
    (B, S), (P, H) = tokens.shape, prompt.shape
    out = word.new_empty(B, P + S, H)
    with on_device_of(word):
        embed_kernel[(B * (P + S), triton.cdiv(H, BLOCK))](
            tokens, word, prompt, word if position is None else position, tokens if ids is None else ids, out, S, P, H, first_row,
            first_row + len(word), tokens.stride(0), 0 if ids is None else ids.stride(0), HAS_POSITIONS=position is not None,
            HAS_IDS=ids is not None, OWNS_PROMPT=owns_prompt, BLOCK=BLOCK, num_warps=warps(WARPS))
    return out


@_embed_op.register_fake
def _(tokens, word, prompt, position, ids, first_row, owns_prompt):
    return word.new_empty(tokens.shape[0], prompt.shape[0] + tokens.shape[1], prompt.shape[1])


def prompt_gradient(grad_BTH: Tensor, rows: int) -> Tensor:
    """[P, H] float32: the batch sum of the first rows."""
    return _prompt_gradient_op(grad_BTH.contiguous(), rows)


@torch.library.custom_op("megakd_kernels::prompt_gradient", mutates_args=())
def _prompt_gradient_op(grad: Tensor, rows: int) -> Tensor:
    B, T, H = grad.shape
    out = grad.new_empty(rows, H, dtype=torch.float32)
    if rows:
        with on_device_of(grad):
            prompt_gradient_kernel[(rows, triton.cdiv(H, BLOCK))](grad, out, B, T, H, BLOCK=BLOCK, num_warps=warps(WARPS))
    return out


@_prompt_gradient_op.register_fake
def _(grad, rows):
    return grad.new_empty(rows, grad.shape[2], dtype=torch.float32)
