"""SFT's page."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.config.methods.base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class SFTConfig(MethodConfig):
    """Supervised fine-tuning."""

    help = "cross-entropy on the responses"
    implementation = "megakd.methods.sft:SFT"
    needs_teacher = False
    writes_responses = False
    student_writes = False
