"""Response priming's page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config.fields import SHARE, TEMPERATURE, flag
from megakd.config.methods.base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class ResponsePrimingConfig(MethodConfig):
    """Response priming (Goyal et al. 2024); what the teacher is told is --teacher-priming, a flag of every method."""

    help = "cross-entropy, and KL(student‖teacher) at a temperature; the teacher is primed"
    implementation = "megakd.methods.response_priming:ResponsePriming"
    writes_responses = False
    student_writes = False
    no_prompt = ", or --priming-objective aligned"

    priming_alpha: float = flag(
        0.6093348343631224, "share of cross-entropy; the rest is temperature² · KL(student‖teacher); default: the paper's", range=SHARE
    )
    priming_temperature: float = flag(5.942267335064758, "of both distributions in that KL; default: the paper's", range=TEMPERATURE)
    priming_objective: Literal["aligned", "original"] = flag(
        "aligned",
        "aligned: what both models predict of the same token of the response; original: what the paper's code compares, place by place and "
        "unshifted, the question's beside the answer's tokens: for comparison alone",
    )

    def work_with_model(self, config):
        return "compares places of the prompts, too (--priming-objective original)" if self.priming_objective == "original" else ""

    def temperature(self, config):
        return self.priming_temperature

    def remarks(self):
        if self.priming_objective == "original":
            yield (
                "--priming-objective original compares each place of the question with the answer's token of the same number, as the "
                "published code does: no model has read what it is asked for"
            )
