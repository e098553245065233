"""MiniLLM's page."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.config.distillation import RatioConfig
from megakd.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, flag, flag_name
from megakd.config.methods.base import MethodConfig


@dataclass(frozen=True, kw_only=True)
class MiniLLMConfig(MethodConfig):
    """MiniLLM's policy gradient (arXiv 2306.08543)."""

    help = "policy gradient on the student's responses"
    implementation = "megakd.methods.minillm:MiniLLM"
    shares = (RatioConfig,)
    answers_prompts_often = True
    teacher_may_move = False

    num_rollouts: int = flag(256, "responses of one phase, over all ranks; a multiple of --global-batch-size", range=POSITIVE)
    ppo_epochs: int = flag(4, "passes over a phase's responses", range=POSITIVE)
    teacher_mixed_alpha: float = flag(
        0.2, "share of the teacher in the distribution that responses are drawn from", range=SHARE
    )
    gamma: float = flag(0.95, "discount of later rewards", range=SHARE)
    reward_scaling: float = flag(0.5, "log p − log q is divided by it", range=POSITIVE)
    cliprange_reward: float = flag(100.0, "largest reward of a token, either sign", range=POSITIVE)
    cliprange: float = flag(0.2, "ε of the clipped objective", range=POSITIVE)
    length_norm: bool = flag(True, "divide a return by the tokens that are left")
    single_step_reg: bool = flag(True, "add the exact KL(q‖p) of every step")
    lm_coef: float = flag(1.0, "weight of the loss on text; 0: none", range=NOT_NEGATIVE)
    lm_data: str = flag("", "text for it, in any form; default: --train-data", path=True)

    def work_with_model(self, config):
        mixes = "draws responses from a mixture with the teacher (--teacher-mixed-alpha)"
        return mixes if self.teacher_mixed_alpha else "keeps the teacher's hidden states and output layer for a phase"

    def learns_own_text(self, config):
        return True

    def validation_errors(self, config):
        rows, save_interval = config.training.global_batch_size, config.output.save_interval
        phase = self.num_rollouts // rows * self.ppo_epochs
        if self.num_rollouts % rows:
            yield f"--num-rollouts {self.num_rollouts} is not a multiple of --global-batch-size {rows}; make it one"
        if save_interval and save_interval % max(1, phase):
            yield (
                f"--save-interval {save_interval} is no multiple of MiniLLM's phase of {phase} iterations, which is not saved; make it one"
            )
        dropouts = {"hidden_dropout": config.models, "attention_dropout": config.models, "lora_dropout": config.lora}
        for name, flags in dropouts.items():
            if dropout := getattr(flags, name):
                yield f"{flag_name(name)} {dropout}: MiniLLM's student learns without dropout, as it wrote; leave it out"
        given = config.teacher_parallel.flags_given(config.parallel)
        if given and self.teacher_mixed_alpha:
            yield (
                f"--teacher-mixed-alpha {self.teacher_mixed_alpha} draws each token from both models, which then need one layout; "
                f"give --teacher-mixed-alpha 0, or leave out {given}"
            )
        if self.teacher_mixed_alpha and config.generation.rollout_engine == "vllm":
            yield (
                f"--rollout-engine vllm draws from one model, and --teacher-mixed-alpha {self.teacher_mixed_alpha} from both; "
                "give --teacher-mixed-alpha 0, or leave the engine out"
            )
        if self.teacher_mixed_alpha == 1:
            yield "--teacher-mixed-alpha 1 leaves the student no say in its responses; use a number below 1"

    def unless(self, config):
        return {"lm_data": (self.lm_coef, "with --lm-coef 0")}
