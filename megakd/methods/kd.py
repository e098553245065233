"""KD: L = (1 − r)·CE + r·D(p, q), D any divergence, on the data's responses or, for a share λ of the batches, on the student's own.

KL(p‖q) on the data is word-level KD (Hinton et al. 2015, as in the MiniLLM and PromptKD papers); λ > 0 is on-policy distillation
(GKD, Agarwal et al. 2024), where nothing but D is learnt from what the student wrote.
"""

import random

from megakd.losses.distillation import Divergence, kd_loss
from megakd.methods.base import Method
from megakd.methods.rollout import rollout
from megakd.methods.sft import SFT
from megakd.schedules import supervised_hidden, supervised_labels

USUAL_RATIO = 0.5  # of --kd-ratio, as in the papers' code


class KD(Method):
    """The teacher reads first and leaves its hidden states on the last stage; the student learns from them."""

    @classmethod
    def answers_prompts(cls, config):
        return cls.on_policy or config.distillation.on_policy_ratio > 0

    @classmethod
    def reads_responses(cls, config):
        return not cls.on_policy and config.distillation.on_policy_ratio < 1

    def train(self, samples, iteration):
        settings = self.config.distillation
        on_policy = random.Random(f"{self.config.training.seed}/{iteration}").random() < settings.on_policy_ratio
        if on_policy:
            with self.time("rollout"):
                samples = rollout(self.student, samples, self.config, self.tokenizer, iteration)
            self.rollouts = samples
        ratio = settings.ratio(USUAL_RATIO)
        return self.learn(samples, iteration, kd_ratio=1.0 if on_policy else ratio)

    def learn(self, samples, iteration, *, kd_ratio):
        """One step on these samples; without a share for the divergence the teacher has nothing to read."""
        settings = self.config.distillation
        if not kd_ratio:
            return SFT.train(self, samples, iteration)
        divergence = Divergence(settings.kd_objective, settings.kd_temperature, settings.beta, settings.skew_alpha)
        batches = self.batches(samples)
        with self.time("teacher"):
            teacher = supervised_hidden(self.teacher, batches)

        def loss(hidden, batch, number):
            q, p = self.through_student(hidden), self.through_teacher(teacher[number])
            return kd_loss(q, p, supervised_labels(batch), self.vocabulary, kd_ratio=kd_ratio, divergence=divergence)

        return self.student_step(batches, loss, ("loss/total", "loss/lm", f"loss/{divergence.objective}"), iteration)
