"""Kullback-Leibler divergences and the prompt loss in plain, differentiable torch: q student, p teacher."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..shards import VocabShard, check_temperature, log_probs, total, weighted

Sum = Callable[[Tensor], Tensor]


def reverse_kl(log_q: Tensor, log_p: Tensor, total: Sum) -> Tensor:
    """KL(q || p)."""
    return total(log_q.exp() * (log_q - log_p))


def forward_kl(log_q: Tensor, log_p: Tensor, total: Sum) -> Tensor:
    """KL(p || q)."""
    return reverse_kl(log_p, log_q, total)


def promptkd_loss(prompted_logits: Tensor, student_logits: Tensor, base_logits: Tensor | None = None, *,
                  base_coef: float | Tensor, base_delta: Tensor | None = None, temperature: float = 1.0,
                  weights: Tensor | None = None, valid_vocab: int | None = None, vocab_start: int | None = None,
                  tp_group: ProcessGroup | None = None, inplace: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_N, kd_N, base_N): loss = kd + base_coef * base, with gradient to the prompted logits; the parts carry none.

    kd = KL(prompted || student), base = KL(prompted || base). The base teacher comes as logits or as `base_delta`, prompted minus
    base logits; with neither, base is zero.
    """
    check_temperature(temperature)
    if base_delta is not None:
        base_logits = prompted_logits.to(torch.promote_types(base_delta.dtype, torch.float32)) - base_delta
    others = [x.detach() for x in (student_logits, base_logits) if x is not None]
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    t, s, *b = (log_probs(z_NV, temperature, weights, shard) for z_NV in shard.cut(prompted_logits, *others))
    kd_N = weighted(reverse_kl(t, s, total(shard)), weights)
    base_N = weighted(reverse_kl(t, b[0], total(shard)), weights) if b else torch.zeros_like(kd_N)
    return kd_N + base_coef * base_N, kd_N.detach(), base_N.detach()
