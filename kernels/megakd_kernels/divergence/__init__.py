"""The table of divergences between a student q and a teacher p, each one function of two rows of log-probabilities.

    def my_divergence(log_q, log_p, total):            [n, Vp] each: this rank's columns, padding cut off
        return total(log_q.exp() * (log_q - log_p))    total sums over the whole vocabulary, on every rank: [n]

That is all a new one needs: a function, and its line below. Autograd differentiates it, chunk by chunk of the fused heads, on any
split of the vocabulary. `beta` and `alpha` reach those that name them. log 0 comes as -1e30. Those that train most runs have kernels
besides, `kl` and `mixture`, which tests hold to these functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..kl.reference import forward_kl, reverse_kl
from ..mixture.reference import jsd, skew_forward_kl, skew_reverse_kl, tvd
from ..shards import check_temperature
from .alpha_beta import alpha_beta

DivergenceFunction = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]
Objective = str | DivergenceFunction
DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "alpha_beta": alpha_beta,
}
OBJECTIVES = tuple(DIVERGENCES)
KLS, MIXTURES = OBJECTIVES[:2], OBJECTIVES[2:6]  # these have kernels


def divergence_function(objective: Objective, beta: float, alpha: float) -> DivergenceFunction:
    """The function of a name with its settings bound; a function given instead is taken as it is."""
    if not isinstance(objective, str):
        return objective
    function = DIVERGENCES[objective]
    settings = {"beta": beta, "alpha": alpha}
    return partial(function, **{name: settings[name] for name in inspect.signature(function).parameters if name in settings})


def check_objective(objective: Objective, beta: float, alpha: float, temperature: float) -> None:
    """ValueError for what no formula covers."""
    if isinstance(objective, str) and objective not in DIVERGENCES:
        raise ValueError(f"objective {objective!r} is unknown; use one of {', '.join(OBJECTIVES)}")
    if objective == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie between 0 and 1 for jsd; use forward_kl or reverse_kl at its ends")
    if objective in ("skew_forward_kl", "skew_reverse_kl") and not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1 for {objective}; use {objective[5:]} for alpha = 0")
    check_temperature(temperature)
