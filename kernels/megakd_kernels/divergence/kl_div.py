"""Divergence per token between a student and a teacher, from vocabulary shards of their logits.

    reverse_kl  KL(q || p)        forward_kl  KL(p || q)        q = softmax(student / T), p = softmax(teacher / T), no factor T^2
    jsd, skew_forward_kl, skew_reverse_kl, tvd: as in `mixture.reference`; all others by autograd

A column where the first distribution has mass and the second has none makes a KL infinite: the loss comes out beyond 1e20, never NaN.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from .. import launch
from ..from_logits import RowLoss, loss_from_logits
from ..kl.loss import KLLoss
from ..mixture.loss import MixtureLoss
from ..shards import VocabShard
from . import KLS, MIXTURES, Objective, check_objective, divergence_function, reference
from .by_autograd import ByAutograd


def divergence(x: Tensor, objective: Objective, beta: float, alpha: float, temperature: float, shard: VocabShard) -> RowLoss:
    """The divergence for tensors like x, by its kernels where it has any. ValueError for settings that no formula covers."""
    check_objective(objective, beta, alpha, temperature)
    options = {"temperature": temperature, "shard": shard}
    if objective in KLS:
        return KLLoss(objective=objective, kernels=launch.kernels(x, "kl"), **options)
    if objective in MIXTURES:
        options |= {"normalisers": launch.kernels(x, "kl"), "kernels": launch.kernels(x, "mixture")}
        return MixtureLoss(objective=objective, share=beta if objective == "jsd" else alpha, **options)
    return ByAutograd(function=divergence_function(objective, beta, alpha), **options)


def kl_div(student_logits: Tensor, teacher_logits: Tensor, *, objective: Objective = "reverse_kl", beta: float = 0.5,
           alpha: float = 0.1, temperature: float = 1.0, weights: Tensor | None = None, valid_vocab: int | None = None,
           vocab_start: int | None = None, tp_group: ProcessGroup | None = None, inplace: bool = False) -> Tensor:
    """[N] float32 divergence of each row of [N, Vp] logits (float32, bfloat16 or float16), times its weight.

    `objective`: a name of OBJECTIVES, or a function as `divergence` describes it.

    Gradient to whichever of the two requires it, exact for any upstream gradient. `weights` [N]: a row of weight 0 is not read.
    `valid_vocab`: real columns of the whole vocabulary. `vocab_start`: this rank's first column, rank * Vp unless given.
    `inplace`: backward writes the gradient over the logits, which nothing else may then need; one backward only.
    """
    if launch.implementation(student_logits) == "reference":
        return reference.kl_div(student_logits, teacher_logits, objective=objective, beta=beta, alpha=alpha,
                                temperature=temperature, weights=weights, valid_vocab=valid_vocab, vocab_start=vocab_start,
                                tp_group=tp_group)
    loss = divergence(student_logits, objective, beta, alpha, temperature, VocabShard(valid_vocab, vocab_start, tp_group))
    return loss_from_logits(loss, weights, inplace, student_logits, teacher_logits)[0]
