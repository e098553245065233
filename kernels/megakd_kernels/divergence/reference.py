"""A divergence of logits in plain, differentiable torch: its function, of log-probabilities over all shards."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from ..shards import VocabShard, log_probs, total, weighted
from . import Objective, check_objective, divergence_function


def kl_div(student_logits: Tensor, teacher_logits: Tensor, *, objective: Objective = "reverse_kl", beta: float = 0.5,
           alpha: float = 0.1, temperature: float = 1.0, weights: Tensor | None = None, valid_vocab: int | None = None,
           vocab_start: int | None = None, tp_group: ProcessGroup | None = None, inplace: bool = False) -> Tensor:
    """[N] divergence of each row of [N, Vp] logits. `inplace` is accepted and changes nothing here."""
    check_objective(objective, beta, alpha, temperature)
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    log_q, log_p = (log_probs(z_NV, temperature, weights, shard) for z_NV in shard.cut(student_logits, teacher_logits))
    return weighted(divergence_function(objective, beta, alpha)(log_q, log_p, total(shard)), weights)
