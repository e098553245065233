"""Divergences from a truncated teacher in plain, differentiable torch: the definition, bucket by bucket."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..divergence import Objective, check_objective, divergence_function
from ..heads.reference import head
from ..shards import FLOOR, SumOverShards, VocabShard, log_probs, weighted
from . import TopKRows


def check_topk(hidden: Tensor, rows: TopKRows, objective: Objective, beta: float, alpha: float, temperature: float,
               shard: VocabShard) -> None:
    """ValueError for settings or rows that cannot be kept exact."""
    check_objective(objective, beta, alpha, temperature)
    if temperature != 1:
        raise ValueError(f"temperature={temperature} needs the teacher's whole distribution: at another temperature the mass of the "
                         "rest is unknown; use temperature=1 with TopKRows")
    rows.check(len(hidden), shard)


def bucket_log_probs(log_q_NV: Tensor, ids_NK: Tensor, start: int, shard: VocabShard) -> Tensor:
    """[N, K + 1] log-probabilities of the tokens and of the rest, from this rank's columns of all of them."""
    columns_NK = ids_NK - start
    here_NK = (columns_NK >= 0) & (columns_NK < log_q_NV.shape[1])
    extra_N1 = log_q_NV.new_full((len(log_q_NV), 1), FLOOR)  # the column of tokens that other ranks hold
    padded_NV = torch.cat([log_q_NV, extra_N1], -1)
    columns_NK = columns_NK.where(here_NK, log_q_NV.shape[1])
    tokens_NK = SumOverShards.apply(padded_NV.gather(1, columns_NK).where(here_NK, 0.0), shard)
    others_NV = padded_NV.scatter(1, columns_NK, FLOOR)
    top_N1 = shard.all_reduce(others_NV.detach().amax(-1, keepdim=True), "max")
    rest_N = SumOverShards.apply((others_NV - top_N1).exp().sum(-1), shard).log() + top_N1[:, 0]
    return torch.cat([tokens_NK, rest_N[:, None]], -1).clamp_min(FLOOR)


def teacher_log_probs(rows: TopKRows, weights_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[N, K + 1], without -inf; of a row of weight 0 zeros, whatever it holds."""
    log_p = torch.cat([rows.log_probs_NK, rows.log_rest_N[:, None]], -1).to(dtype).clamp_min(FLOOR)
    return log_p if weights_N is None else torch.where((weights_N != 0)[:, None], log_p, 0.0)


def fused_linear_topk_kl(hidden: Tensor, weight: Tensor, rows: TopKRows, *, objective: Objective = "forward_kl",
                         beta: float = 0.5, alpha: float = 0.1, temperature: float = 1.0, weights: Tensor | None = None,
                         valid_vocab: int | None = None, vocab_start: int | None = None,
                         tp_group: ProcessGroup | None = None) -> Tensor:
    """[N] divergence of hidden states [N, H] through their head from the rows."""
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    check_topk(hidden, rows, objective, beta, alpha, temperature, shard)
    (logits_NV,) = shard.cut(head(hidden, weight, tp_group))
    log_q = bucket_log_probs(log_probs(logits_NV, 1.0, weights, shard), rows.ids_NK.long(), shard.start(len(weight)), shard)
    function = divergence_function(objective, beta, alpha)
    return weighted(function(log_q, teacher_log_probs(rows, weights, log_q.dtype), lambda x: x.sum(-1)), weights)
