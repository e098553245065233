"""SeqKD's page."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.config.distillation import DivergenceConfig, HiddenMatchingConfig, RatioConfig
from megakd.config.methods.base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class SeqKDConfig(MethodConfig):
    """Sequence-level KD."""

    help = "the teacher's own responses"
    implementation = "megakd.methods.seqkd:SeqKD"
    shares = (RatioConfig, DivergenceConfig, HiddenMatchingConfig)
    teacher_may_move = False
    student_writes = False

    def work_with_model(self, config):
        return "lets the teacher write the responses (scripts/generate.py would, for --method kd)"

    def unless(self, config):
        has_divergence = config.distillation.ratio(0.0) or config.training.reference_compat.seqkd_with_kd
        return dict.fromkeys(("kd_objective", "kd_temperature"), (has_divergence, "with --method seqkd unless --kd-ratio is above 0"))
