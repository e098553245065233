"""PromptKD's page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megakd.config.fields import NOT_NEGATIVE, POSITIVE, flag
from megakd.config.methods.base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class PromptKDConfig(MethodConfig):
    """PromptKD's soft prompt (arXiv 2402.12842)."""

    help = "KL to a prompted teacher on the student's responses"
    implementation = "megakd.methods.promptkd:PromptKD"
    answers_prompts_often = True

    prompt_len: int = flag(7, "soft prompt vectors in front of the teacher", range=POSITIVE)
    prompt_init: Literal["text", "random"] = flag(
        "text", "start from the embeddings of --prompt-init-text, or from random vectors"
    )
    prompt_init_text: str = flag("Suppose you are a student.", "repeated or cut to --prompt-len tokens")
    teacher_lr: float | None = flag(None, "the soft prompt's highest learning rate; default: --lr", range=NOT_NEGATIVE)
    teacher_kld_type: Literal["reverse", "forward"] = flag(
        "reverse", "reverse: KL(prompted teacher‖student), forward: the other way round"
    )
    base_kld_type: Literal["reverse", "forward"] = flag("reverse", "the same for the base teacher in the student's place")
    base_coef: float = flag(
        1.0, "weight of KL(prompted‖base teacher) at the start; it falls linearly to 0", range=NOT_NEGATIVE
    )

    @property
    def soft_prompt_len(self):
        return self.prompt_len

    def work_with_model(self, config):
        return "trains a soft prompt in front of the teacher"

    def learns_own_text(self, config):
        return True

    def unless(self, config):
        return {"prompt_init_text": (self.prompt_init == "text", "with --prompt-init random")}
