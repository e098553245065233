"""Divergences from a mixture of both models in plain, differentiable torch: q student, p teacher.

    skew_forward_kl  KL(p || alpha p + (1 - alpha) q)      skew_reverse_kl   KL(q || alpha q + (1 - alpha) p)
    jsd              beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
    tvd              1/2 sum |q - p|
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kl.reference import Sum, reverse_kl


def _mixture(share_of_a: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    return torch.logaddexp(log_a + math.log(share_of_a), log_b + math.log1p(-share_of_a))


def jsd(log_q: Tensor, log_p: Tensor, total: Sum, *, beta: float) -> Tensor:
    """The generalised Jensen-Shannon divergence."""
    log_m = _mixture(beta, log_p, log_q)
    return beta * reverse_kl(log_p, log_m, total) + (1 - beta) * reverse_kl(log_q, log_m, total)


def skew_forward_kl(log_q: Tensor, log_p: Tensor, total: Sum, *, alpha: float) -> Tensor:
    """KL from the teacher to a mixture of both."""
    return reverse_kl(log_p, _mixture(alpha, log_p, log_q), total)


def skew_reverse_kl(log_q: Tensor, log_p: Tensor, total: Sum, *, alpha: float) -> Tensor:
    """KL from the student to a mixture of both."""
    return skew_forward_kl(log_p, log_q, total, alpha=alpha)


def tvd(log_q: Tensor, log_p: Tensor, total: Sum) -> Tensor:
    """Total variation; both sum to one, so that half of |q - p| is its positive part."""
    return total((log_q.exp() - log_p.exp()).relu())
