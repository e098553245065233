"""The word embedding of a batch with the soft prompt in front, on a vocabulary-parallel table.

    out[b, i] = prompt[i] + position[i]             for i < P           (added by rank 0)
                word[token[b, i - P]] + position[i] otherwise           (added by the rank that holds the token)

Every row is written by exactly one rank and zero elsewhere: the one all-reduce that tensor parallelism needs anyway is exact in
any dtype. Backward is the batch sum of the first P rows, in float32, the same on every rank. The tables are frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from .. import launch
from ..shards import VocabShard
from . import reference


class _PromptEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prompt_PH: Tensor, tokens_BS: Tensor, word_VH: Tensor, position_weight: Tensor | None,
                position_ids: Tensor | None, shard: VocabShard) -> Tensor:
        ctx.kernels = launch.kernels(word_VH, "prompt_embedding")
        ctx.prompt = prompt_PH.shape[0], prompt_PH.dtype
        out_BTH = ctx.kernels.embed(tokens_BS, word_VH, prompt_PH, position_weight, position_ids,
                                    shard=shard)
        return shard.all_reduce(out_BTH)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTH: Tensor):
        rows, dtype = ctx.prompt
        return ctx.kernels.prompt_gradient(grad_BTH, rows).to(dtype), None, None, None, None, None


def prompt_embedding(tokens_BS: Tensor, word_weight: Tensor, prompt_PH: Tensor, position_weight: Tensor | None = None,
                     position_ids: Tensor | None = None, *, vocab_start: int | None = None,
                     tp_group: ProcessGroup | None = None) -> Tensor:
    """[B, P + S, H] in word_weight's dtype: the soft prompt, then the words, plus positions. Gradient to the prompt only.

    `word_weight` [Vp, H] is this rank's shard; `prompt_PH` and `position_weight` [positions, H] are whole on every rank;
    `position_ids` [B, P + S] or [P + S] count from 0 where not given. ValueError where a table requires a gradient.
    """
    if launch.implementation(word_weight, "prompt_embedding") == "reference":
        return reference.prompt_embedding(tokens_BS, word_weight, prompt_PH, position_weight, position_ids,
                                          vocab_start=vocab_start, tp_group=tp_group)
    reference.check_frozen(word_weight, position_weight)
    return _PromptEmbedding.apply(prompt_PH, tokens_BS, word_weight, position_weight, position_ids,
                                  VocabShard(vocab_start=vocab_start, tp_group=tp_group))
