"""Word embeddings whose gradient goes, row by row, where Megatron's data parallelism sums it.

torch's own gradient is a table of the vocabulary's size with a few rows that are not zero, in the weights' dtype: under bfloat16 rounded,
and for every micro-batch one more to make and to add.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VE: Tensor, row_BS: Tensor, awaited: bool) -> Tensor:
        ctx.save_for_backward(row_BS)
        ctx.weight, ctx.awaited = weight_VE, awaited
        return F.embedding(row_BS, weight_VE)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSE: Tensor):
        (row_BS,) = ctx.saved_tensors
        sums_VE = ctx.weight.main_grad
        sums_VE.index_put_((row_BS.flatten(),), grad_BSE.flatten(0, 1).to(sums_VE.dtype), accumulate=True)  # in the same order each time
        return torch.zeros_like(ctx.weight) if ctx.awaited else None, None, None


def word_rows(embedding: VocabParallelEmbedding, tokens_BS: Tensor, *, awaited: bool) -> Tensor:
    """[B, S, E], as the module itself gives them. Its weight needs a `main_grad`, of a model inside its DistributedDataParallel.

    Args:
        awaited: whether that waits for a gradient to come by, as it does where gradients travel during the backward pass.
    """
    weight_VE, group = embedding.weight, embedding.tp_group
    if group.size() == 1:
        return _Rows.apply(weight_VE, tokens_BS, awaited)
    here_BS = (tokens_BS >= embedding.vocab_start_index) & (tokens_BS < embedding.vocab_end_index)
    x_BSE = _Rows.apply(weight_VE, (tokens_BS - embedding.vocab_start_index).where(here_BS, 0), awaited)
    return reduce_from_tensor_model_parallel_region(x_BSE.where(here_BS[..., None], 0.0), group=group)
