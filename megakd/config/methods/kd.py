"""KD's page, with GKD's share of the student's own text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megakd.config.distillation import DivergenceConfig, HiddenMatchingConfig, RatioConfig
from megakd.config.fields import SHARE, alias, flag
from megakd.config.methods.base import MethodConfig

WRITES = ("temperature", "top_k", "top_p", "rollout_batch_size", "rollout_engine", "save_rollouts")


@dataclass(frozen=True, kw_only=True)
class KDConfig(MethodConfig):
    """KD on the data, or on the student's own text (GKD, arXiv 2306.13649)."""

    help = "a divergence on the responses"
    implementation = "megakd.methods.kd:KD"
    shares = (RatioConfig, DivergenceConfig, HiddenMatchingConfig)
    answers_prompts_often = True
    no_prompt = ", or leave out --on-policy-ratio"

    on_policy_ratio: Annotated[float, alias("--lmbda")] = flag(
        0.0, "kd: share of the batches that the student writes (GKD's lambda)", range=SHARE
    )

    def learns_own_text(self, config):
        return self.on_policy_ratio > 0

    def validation_errors(self, config):
        answers = config.generation.num_generations
        if answers > 1 and self.on_policy_ratio < 1:
            yield (
                f"--num-generations {answers}: of the data, which --on-policy-ratio {self.on_policy_ratio:g} learns, a prompt has one "
                "answer; give --on-policy-ratio 1, or leave it out"
            )

    def no_response(self, usual):
        if self.on_policy_ratio:
            return f"--on-policy-ratio {self.on_policy_ratio:g} learns it in the other batches; give one, or --on-policy-ratio 1"
        return f"{usual}, or --on-policy-ratio 1, with which the student writes it"

    def unless(self, config):
        return dict.fromkeys(WRITES, (self.on_policy_ratio, "with --method kd unless --on-policy-ratio is above 0"))
