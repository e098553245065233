"""DistiLLM's page."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.config.distillation import DivergenceConfig, HiddenMatchingConfig, RatioConfig
from megakd.config.fields import POSITIVE, flag
from megakd.config.methods.base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class DistiLLMConfig(MethodConfig):
    """DistiLLM's adaptive off-policy data (arXiv 2402.03898)."""

    help = "kd with the student's own text as it begins to help"
    implementation = "megakd.methods.distillm:DistiLLM"
    shares = (RatioConfig, DivergenceConfig, HiddenMatchingConfig)
    learns_from_evaluations = True

    replay_capacity: int = flag(
        1000, "distillm: responses of the student that are kept to be learnt from again", range=POSITIVE
    )

    def learns_own_text(self, config):
        return True

    def validation_errors(self, config):
        if not config.data.valid_data:
            yield "--method distillm needs --valid-data; it watches the held-out loss"
