"""Cross-entropy with labels, from vocabulary shards of the logits.

    loss = lse(z) - z[label]            dz = softmax(z) - [v = label]

Three floats a row (maximum A, sum of e^(z - A), the label's z - A on the rank that holds it) merge with one all-gather; backward
writes the gradient from the logits and their log-sum-exp. N rows (tokens), Vp columns on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import launch, reference
from .kl_div import check_unspent, clear_padding, gradient_like, weights_for
from .shards import VocabShard


def merge(stats_P3N: Tensor) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, loss), each [N], of all parts of the vocabulary; a label that nobody holds costs 1e30."""
    A, total, label = stats_P3N.unbind(1)
    top = A.amax(0)
    log_total = ((A - top).exp() * total).sum(0).log()
    return top + log_total, log_total - (label + (A - top)).amax(0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None, shard: VocabShard, inplace: bool) -> Tensor:
        kernels = launch.kernels(logits_NV, "cross_entropy")
        weights_N = weights_for(weights_N, logits_NV)
        labels_N = labels_N - shard.start(logits_NV.shape[1])
        lse_N, loss_N = merge(shard.all_gather(kernels.statistics(*shard.cut(logits_NV), labels_N, weights_N)))
        ctx.save_for_backward(logits_NV, labels_N, weights_N, lse_N)
        ctx.settings = kernels, shard, inplace
        ctx.spent = False
        return loss_N if weights_N is None else loss_N * weights_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):
        check_unspent(ctx)
        kernels, shard, inplace = ctx.settings
        logits_NV, labels_N, weights_N, lse_N = ctx.saved_tensors
        (z_NV,) = shard.cut(logits_NV)
        grad_NV = gradient_like(logits_NV, inplace)
        scale_N = grad_N if weights_N is None else grad_N * weights_N
        kernels.gradient(z_NV, labels_N, lse_N, scale_N, grad_NV[:, : z_NV.shape[1]])
        clear_padding(grad_NV, z_NV.shape[1])
        return grad_NV, None, None, None, None


def cross_entropy(logits: Tensor, labels_N: Tensor, *, weights: Tensor | None = None, valid_vocab: int | None = None,
                  vocab_start: int | None = None, tp_group: ProcessGroup | None = None, inplace: bool = False) -> Tensor:
    """[N] float32 minus log-probability of each row's label, an index of the whole vocabulary, times the row's weight.

    The label of a row of weight 0 may be anything; any other label outside the vocabulary costs 1e30. The other options are those
    of `kl_div`.
    """
    if launch.implementation(logits) == "reference":
        return reference.cross_entropy(logits, labels_N, weights=weights, valid_vocab=valid_vocab, vocab_start=vocab_start,
                                       tp_group=tp_group)
    return _CrossEntropy.apply(logits, labels_N, weights, VocabShard(valid_vocab, vocab_start, tp_group), inplace)
