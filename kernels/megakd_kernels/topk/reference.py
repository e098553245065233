"""Divergences from a truncated teacher in plain, differentiable torch: the definition, bucket by bucket."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..divergence import Objective, check_objective, divergence_function
from ..heads.reference import fused_linear_cross_entropy, head
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


def bias_bounds(log_q_rest_N: Tensor, log_q_ends_N: tuple[Tensor, Tensor], log_p_NB: Tensor,
                log_p_min_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """([N], [N]): what KL(p‖q) and KL(q‖p) of whole rows are above those of the buckets, at most; `topk` has the formula.

    log_q_ends: of the student's likeliest token among the rest, and of its least likely one. No token of the teacher's rest is
    likelier than the least of its K, nor than all of its rest.
    """
    log_p_rest_N, (log_q_max_N, log_q_min_N) = log_p_NB[:, -1], log_q_ends_N
    log_p_min_N = torch.full_like(log_p_rest_N, FLOOR) if log_p_min_N is None else log_p_min_N.to(log_p_NB.dtype).clamp_min(FLOOR)
    gap = lambda a_rest, a_max, b_rest, b_min: (a_rest.exp() * ((a_max - b_min) - (a_rest - b_rest))).clamp_min(0)
    return (gap(log_p_rest_N, log_p_NB.amin(-1), log_q_rest_N, log_q_min_N),
            gap(log_q_rest_N, log_q_max_N, log_p_rest_N, log_p_min_N))


def fused_linear_topk_kl(*arguments, **options) -> Tensor:
    """The first of `fused_linear_topk_kl_with_bias`."""
    return fused_linear_topk_kl_with_bias(*arguments, **options)[0]


def fused_linear_topk_kl_with_bias(hidden: Tensor, weight: Tensor, rows: TopKRows, *, objective: Objective = "forward_kl",
                                   beta: float = 0.5, alpha: float = 0.1, temperature: float = 1.0, weights: Tensor | None = None,
                                   valid_vocab: int | None = None, vocab_start: int | None = None,
                                   tp_group: ProcessGroup | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """[N] divergence of hidden states [N, H] through their head from the rows, and the bounds of what a forward and a reverse KL
    can be too low by."""
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    check_topk(hidden, rows, objective, beta, alpha, temperature, shard)
    (logits_NV,) = shard.cut(head(hidden, weight, tp_group))
    log_q_NV, start = log_probs(logits_NV, 1.0, weights, shard), shard.start(len(weight))
    log_q = bucket_log_probs(log_q_NV, rows.ids_NK.long(), start, shard)
    log_p = teacher_log_probs(rows, weights, log_q.dtype)
    loss = divergence_function(objective, beta, alpha)(log_q, log_p, lambda x: x.sum(-1))
    ends = rest_ends(log_q_NV.detach(), rows.ids_NK.long() - start, shard)
    return tuple(weighted(x, weights) for x in (loss, *bias_bounds(log_q[:, -1].detach(), ends, log_p, rows.log_min_N)))


def fused_linear_topk_kd_loss(hidden: Tensor, weight: Tensor, rows: TopKRows, labels_N: Tensor, *, label_coef: float, distance_coef: float,
                              weights: Tensor | None = None, valid_vocab: int | None = None, vocab_start: int | None = None,
                              tp_group: ProcessGroup | None = None, **divergence) -> tuple[Tensor, ...]:
    """(label_coef cross_entropy + distance_coef divergence, both, and the divergence's bounds)."""
    options = {"weights": weights, "valid_vocab": valid_vocab, "vocab_start": vocab_start, "tp_group": tp_group}
    label_N = fused_linear_cross_entropy(hidden, weight, labels_N, **options)
    distance_N, *bounds = fused_linear_topk_kl_with_bias(hidden, weight, rows, **divergence, **options)
    return label_coef * label_N + distance_coef * distance_N, label_N.detach(), distance_N.detach(), *bounds


def rest_ends(log_q_NV: Tensor, columns_NK: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """[N] log-probability of the likeliest token outside the K, and of the least likely of all."""
    columns_NK = columns_NK.where((columns_NK >= 0) & (columns_NK < log_q_NV.shape[1]), log_q_NV.shape[1])
    others_NV = torch.cat([log_q_NV, log_q_NV.new_full((len(log_q_NV), 1), FLOOR)], -1).scatter(1, columns_NK, FLOOR)
    negative_NV = torch.cat([-log_q_NV, log_q_NV.new_full((len(log_q_NV), 1), FLOOR)], -1)
    return shard.all_reduce(others_NV.amax(-1), "max"), -shard.all_reduce(negative_NV.amax(-1), "max")
