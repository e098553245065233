"""Cross-entropy with labels in plain, differentiable torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..shards import VocabShard, log_probs, total, weighted


def cross_entropy(logits: Tensor, labels_N: Tensor, *, weights: Tensor | None = None, valid_vocab: int | None = None,
                  vocab_start: int | None = None, tp_group: ProcessGroup | None = None, inplace: bool = False) -> Tensor:
    """[N] minus log-probability of each row's label (an index of the whole vocabulary); weight 0 allows any label."""
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    (z_NV,) = shard.cut(logits)
    start = shard.start(logits.shape[-1])
    here_NV = torch.arange(start, start + z_NV.shape[-1], device=z_NV.device) == labels_N[:, None]
    log_probs_NV = log_probs(z_NV, 1.0, weights, shard)
    return weighted(-total(shard)(torch.where(here_NV, log_probs_NV, 0.0)), weights)
