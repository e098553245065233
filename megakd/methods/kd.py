"""KD: L = (1 − r)·CE + r·D(p, q), D any divergence, on the data's responses or, for a share λ of the batches, on the student's own.

KL(p‖q) on the data is word-level KD (Hinton et al. 2015, as in the MiniLLM and PromptKD papers); λ > 0 is on-policy distillation
(GKD, Agarwal et al. 2024), where nothing but D is learnt from what the student wrote.
"""

import random

from megakd.losses.distillation import Divergence, kd_loss
from megakd.losses.own_divergence import objective_of
from megakd.methods.base import Method
from megakd.methods.hidden_matching import HiddenMatching, projections
from megakd.methods.rollout import rollout

USUAL_RATIO = 0.5  # of --kd-ratio, as in the papers' code


class KD(Method):
    """The teacher reads first; the student learns from what it says."""

    @classmethod
    def modules(cls, student, teacher, config):
        return projections(student, teacher, config.distillation, config.training.seed)

    @classmethod
    def answers_prompts(cls, config):
        return cls.on_policy or config.kd.on_policy_ratio > 0

    @classmethod
    def reads_responses(cls, config):
        return not cls.on_policy and config.kd.on_policy_ratio < 1

    def train(self, samples, iteration):
        on_policy = random.Random(f"{self.config.training.seed}/{iteration}").random() < self.config.kd.on_policy_ratio
        if on_policy:
            with self.time("rollout"):
                samples = rollout(self.student, samples, self.config, self.ends, iteration)
            self.rollouts = samples
        ratio = self.config.distillation.ratio(USUAL_RATIO)
        return self.learn(samples, iteration, kd_ratio=1.0 if on_policy else ratio)

    def learn(self, samples, iteration, *, kd_ratio):
        """One step on these samples; without a share for the divergence, and no hidden states to match, the teacher reads nothing."""
        settings = self.config.distillation
        if not (kd_ratio or settings.hidden_coef):
            return self.cross_entropy_step(samples, iteration)
        divergence = Divergence(objective_of(settings), settings.kd_temperature, settings.beta, settings.skew_alpha)
        batches = self.batches(samples)

        def loss(q, batch, p):
            return kd_loss(q, p, batch.supervised_labels, self.vocabulary, kd_ratio=kd_ratio, divergence=divergence)

        context = self.read_teacher(batches)
        if not settings.hidden_coef:
            return self.student_step(batches, loss, iteration, context=context)
        with self.time("teacher"):
            matching = HiddenMatching(self.student, self.teacher, settings, batches)
        with matching.pulling():
            learnt = self.student_step(batches, loss, iteration, context=context)
        hidden = matching.mean(learnt["tokens"])
        return learnt | {"loss/total": learnt["loss/total"] + settings.hidden_coef * hidden, "loss/hidden": hidden}
