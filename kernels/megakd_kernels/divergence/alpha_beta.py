"""The alpha-beta divergence of Cichocki et al. 2011, which ABKD (arXiv 2503.04067) distils with: q student, p teacher.

    D(p || q) = -1/(alpha beta) sum_v [ p^alpha q^beta - alpha/s p^s - beta/s q^s ],   s = alpha + beta,   alpha, beta > 0

alpha -> 1, beta -> 0 is KL(p || q); alpha -> 0, beta -> 1 is KL(q || p); s = 1 are the alpha-divergences; 1, 1 is 1/2 sum (p - q)^2.
A larger alpha weighs the columns where p is large, a larger beta those where q is. Where p is about q the three terms cancel: with
t = max(p, q), d = log min(p, q) - log t <= 0 and c the exponent of the smaller one the summand is t^s (e^(c d) - 1 - c/s (e^(s d) - 1)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def alpha_beta(log_q: Tensor, log_p: Tensor, total: Callable[[Tensor], Tensor], *, alpha: float, beta: float) -> Tensor:
    """[N] divergence; ValueError where alpha or beta is not positive."""
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"alpha={alpha} and beta={beta} must be positive for alpha_beta; use forward_kl for 1, 0 and reverse_kl for 0, 1")
    s, d = alpha + beta, -(log_q - log_p).abs()
    c = torch.where(log_q <= log_p, log_q.new_full((), beta), log_q.new_full((), alpha))  # numbers alone would be float32
    return total((s * torch.maximum(log_q, log_p)).exp() * (torch.expm1(c * d) - c / s * torch.expm1(s * d))) / (-alpha * beta)
