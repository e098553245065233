"""Flags that several methods share: the divergence, its share of the loss, and hidden-state matching beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from megakd.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, TEMPERATURE, alias, flag, flag_name

if TYPE_CHECKING:
    from megakd.config.train import Config

OBJECTIVES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha_beta")
SHARE_OF = {"jsd": "beta", "skew_forward_kl": "skew_alpha", "skew_reverse_kl": "skew_alpha"}  # whose 0 and 1 leave no mixture


@dataclass(frozen=True, kw_only=True)
class RatioConfig:
    """How much of the loss the divergence is."""

    kd_ratio: Annotated[float | None, alias("--kd-alpha")] = flag(
        None,
        "share of the divergence, the rest is cross-entropy; default: 0.5 (kd, minillm's text), 0 (seqkd), 1 (distillm)",
        range=SHARE,
    )

    def ratio(self, usual: float) -> float:
        """--kd-ratio, or a method's usual one where it is not given."""
        return usual if self.kd_ratio is None else self.kd_ratio


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig:
    """Which divergence."""

    kd_objective: str = flag(
        "forward_kl", f"which divergence between teacher p and student q: {', '.join(OBJECTIVES)}; or your own, FILE.py:FUNCTION", path=True
    )
    kd_temperature: float = flag(
        1.0, "temperature of both distributions in the divergence, never of sampling", range=TEMPERATURE
    )
    beta: float = flag(0.5, "jsd: the teacher's share of the mixture; alpha_beta: its β", range=SHARE)
    skew_alpha: float = flag(
        0.1, "skew_*: share of the first distribution in the mixture (DistiLLM); alpha_beta: its α", range=SHARE
    )


    @property
    def own_divergence(self) -> tuple[str, str] | None:
        """File and function of a divergence of the user's own."""
        found = re.fullmatch(r"(.+\.py):(\w+)", self.kd_objective)
        return found and found.groups()


@dataclass(frozen=True, kw_only=True)
class HiddenMatchingConfig:
    """Hidden states beside distributions."""

    hidden_coef: float = flag(0.0, "weight of matching hidden states beside distributions; 0: none", range=NOT_NEGATIVE)
    hidden_loss: Literal["mse", "cosine"] = flag("mse", "the distance of two hidden states")
    hidden_layers: tuple[int, ...] = flag(
        (),
        "layers of the student to match, counted from 1, each with the teacher's at the same height; default: the last",
        range=POSITIVE,
    )


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(HiddenMatchingConfig, DivergenceConfig, RatioConfig):
    """What the student learns from the teacher."""

    def validation_errors(self, config: Config) -> Iterator[str]:
        """What cannot be, one line each."""
        if self.kd_objective not in OBJECTIVES and not self.own_divergence:
            yield f"--kd-objective {self.kd_objective!r} is unknown; use one of {', '.join(OBJECTIVES)}, or FILE.py:FUNCTION"
        if self.kd_objective == "alpha_beta" and not self.skew_alpha * self.beta:
            yield "--kd-objective alpha_beta needs --skew-alpha and --beta above 0; use forward_kl for 1 and 0, reverse_kl for 0 and 1"
        share = SHARE_OF.get(self.kd_objective)
        if share and getattr(self, share) in (0, 1):
            yield f"{flag_name(share)} {getattr(self, share)} leaves {self.kd_objective} no mixture; use a number between 0 and 1"
        if self.hidden_coef and config.training.recompute:
            yield "--hidden-coef with --recompute: a layer that runs twice would be matched twice; leave one of them out"
        if self.hidden_coef and config.training.reference_compat.mean_of_means:
            yield "--hidden-coef is a token mean, which --reference-behaviour mean-of-means is not; leave one of them out"

    def unless(self) -> dict[str, tuple[Any, str]]:
        """Flags that are read under a condition: whether it holds, and how a message says that it does not."""
        objective = self.kd_objective
        return {
            "beta": (objective in ("jsd", "alpha_beta"), "without --kd-objective jsd or alpha_beta"),
            "skew_alpha": (objective.startswith(("skew", "alpha")), "without --kd-objective skew_* or alpha_beta"),
            **dict.fromkeys(("hidden_loss", "hidden_layers"), (self.hidden_coef, "without --hidden-coef")),
        }
