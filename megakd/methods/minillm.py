"""MiniLLM (Gu et al. 2024, arXiv 2306.08543): reverse KL over whole responses by policy gradient.

A phase begins with `num_rollouts` responses drawn from (1 − α) q + α p; `ppo_epochs` passes over them follow, one global batch an
iteration. What the phase needs of the teacher and of the student that wrote is computed once, when it begins:

    L = L_policy (losses/policy_gradient.py)  +  mean_t KL(q‖p)  +  lm_coef · [(1 − r) CE + r KL(p‖q)] on text

The second term is the exact gradient of each single step (the paper's regularisation), the third keeps the student's language. All
three are token means over the global batch; advantages are whitened over its valid tokens.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megakd.data.dataloader import DataLoader
from megakd.data.open_data import open_responses
from megakd.generation.rows import Voice
from megakd.losses.distillation import Divergence, function_of_log_q, kd_loss, reverse_kl_loss, sft_loss
from megakd.losses.policy_gradient import advantages, clipped_policy_loss, importance_weights, token_rewards, whiten
from megakd.methods.base import Method
from megakd.methods.kd import USUAL_RATIO
from megakd.methods.rollout import rollout
from megakd.schedules import supervised_hidden, supervised_labels


@dataclass(frozen=True)
class Experience:
    """What the last stage remembers of one response of n tokens."""

    old_log_q: Tensor  # [n] of the student that wrote it
    rewards: Tensor  # [n]
    weights: Tensor  # [n]
    teacher_hidden: Tensor  # [n, H]


class MiniLLM(Method):
    """Phases of `steps_per_phase` iterations; `experience` is of the phase in hand and is never saved."""

    on_policy = True

    def __init__(self, cast, config, *, total_iters):
        super().__init__(cast, config, total_iters=total_iters)
        self.settings = config.minillm
        self.batches_per_phase = self.settings.num_rollouts // config.training.global_batch_size
        self.steps_per_phase = self.batches_per_phase * self.settings.ppo_epochs
        self.text = cast.text

    @classmethod
    def open_text(cls, config, tokenizer, layout):
        settings, data = config.minillm, config.data
        if not settings.lm_coef:
            return None
        no_response = f"--lm-coef {settings.lm_coef:g} learns it as text: give text with --lm-data, or --lm-coef 0 for prompts alone"
        dataset = open_responses(settings.lm_data or data.train_data, tokenizer, data, full_rows=True, no_response=no_response)
        rows, seed = config.training.global_batch_size, config.training.seed + 1
        return DataLoader(dataset, global_batch_size=rows, seed=seed, dp_rank=layout.dp_rank, dp_size=layout.dp_size)

    def train_iteration(self, loader, iteration):
        phase, step = divmod(iteration - 1, self.steps_per_phase)
        if step == 0:
            first = phase * self.batches_per_phase
            self.begin_phase([s for i in range(self.batches_per_phase) for s in loader.samples(first + i)], iteration)
        text = self.text.samples(iteration - 1) if self.text else []
        return self.learn(self.chosen(phase, step), text, iteration)

    def begin_phase(self, samples, iteration):
        """Write the responses, and remember log q, r, w and the teacher's hidden states of every token."""
        settings = self.settings
        with self.time("rollout"):
            voices = [Voice(self.teacher, settings.teacher_mixed_alpha)] if settings.teacher_mixed_alpha else []
            self.rollouts = rollout(self.student, samples, self.config, self.tokenizer, iteration, mix_with=voices)
        self.numbered = [replace(sample, sample_id=number) for number, sample in enumerate(self.rollouts)]
        batches, self.experience = self.batches(self.numbered), {}
        with self.time("teacher"):
            teacher = supervised_hidden(self.teacher, batches)
        with self.time("old_log_q"):
            student = supervised_hidden(self.student, batches)
        for batch, p, q in zip(batches, teacher, student):
            self._remember(batch, p, q)

    @torch.no_grad()
    def _remember(self, batch, teacher_hidden, student_hidden):
        settings, labels = self.settings, supervised_labels(batch).to(student_hidden.device)
        log_p = -sft_loss(self.through_teacher(teacher_hidden), labels, self.vocabulary)["loss/lm"]
        log_q = -sft_loss(self.through_student(student_hidden), labels, self.vocabulary)["loss/lm"]
        rewards = token_rewards(log_p, log_q, scale=settings.reward_scaling, limit=settings.cliprange_reward)
        weights = importance_weights(log_p, log_q, alpha=settings.teacher_mixed_alpha)
        lengths = batch.loss_mask.sum(1).long().tolist()
        for number, *parts in zip(
            batch.sample_ids.tolist(), *(x.split(lengths) for x in (log_q, rewards, weights, teacher_hidden))
        ):
            self.experience[number] = Experience(*parts)

    def chosen(self, phase, step):
        """This replica's share of one iteration: every epoch is a fresh order of the phase's responses."""
        epoch, position = divmod(step, self.batches_per_phase)
        order = np.random.default_rng((self.config.training.seed, phase, epoch)).permutation(len(self.numbered))
        size = len(self.numbered) // self.batches_per_phase
        return [self.numbered[i] for i in order[position * size : (position + 1) * size]]

    def learn(self, samples, text, iteration):
        """One optimizer step on micro-batches of rollouts and of text together."""
        rollouts, texts = self.batches(samples), self.batches(text)
        of_rollouts, of_text = self.shares(rollouts, texts)
        advantage = self.advantages_of(samples)
        with self.time("teacher"):
            teacher_on_text = supervised_hidden(self.teacher, texts) if texts else []

        def loss(hidden, batch, number):
            if number < len(rollouts):
                values, share = self.policy_loss(hidden, batch, advantage), of_rollouts
            else:
                values, share = self.text_loss(hidden, teacher_on_text[number - len(rollouts)], batch), of_text
            return {name: value * share for name, value in values.items()}

        names = ("loss/total", "loss/policy", "loss/reverse_kl", "loss/text")
        return self.student_step(rollouts + texts, loss, names, iteration)

    def policy_loss(self, hidden, batch, advantage):
        """L_policy and, unless --no-single-step-reg, KL(q‖p): [N] over the tokens of rollouts."""
        numbers = batch.sample_ids.tolist()
        recall = lambda field: torch.cat([getattr(self.experience[number], field) for number in numbers])
        student, labels = self.through_student(hidden), supervised_labels(batch)
        chosen = torch.cat([advantage[number] for number in numbers])
        objective = lambda log_q: clipped_policy_loss(
            log_q, recall("old_log_q"), chosen, recall("weights"), clip=self.settings.cliprange
        )
        policy = function_of_log_q(objective, student, labels, self.vocabulary)
        zero = torch.zeros_like(policy)
        if not self.settings.single_step_reg:
            return {"loss/total": policy, "loss/policy": policy, "loss/reverse_kl": zero, "loss/text": zero}
        single_step = reverse_kl_loss(student, self.through_teacher(recall("teacher_hidden")), self.vocabulary)["loss/reverse_kl"]
        return {"loss/total": policy + single_step, "loss/policy": policy, "loss/reverse_kl": single_step, "loss/text": zero}

    def text_loss(self, hidden, teacher_hidden, batch):
        """lm_coef · [(1 − r) CE + r KL(p‖q)]: [N] over the tokens of text."""
        q, p = self.through_student(hidden), self.through_teacher(teacher_hidden)
        ratio = self.config.distillation.ratio(USUAL_RATIO)
        text = kd_loss(q, p, supervised_labels(batch), self.vocabulary, kd_ratio=ratio, divergence=Divergence("forward_kl"))[
            "loss/total"
        ]
        zero = torch.zeros_like(text)
        return {"loss/total": self.settings.lm_coef * text, "loss/policy": zero, "loss/reverse_kl": zero, "loss/text": text}

    def advantages_of(self, samples):
        """Whitened A_t of every response by its number; on the last stage, which alone knows the rewards."""
        if not self.experience:
            return {}
        rewards = [self.experience[sample.sample_id].rewards for sample in samples]
        rewards_RT = pad_sequence(rewards, batch_first=True)
        mask_RT = pad_sequence([torch.ones_like(r) for r in rewards], batch_first=True)
        raw_RT = advantages(rewards_RT, mask_RT, gamma=self.settings.gamma, length_norm=self.settings.length_norm)
        count = len(samples) * self.config.max_new_tokens if self.config.training.quirk("whiten-padding") else None
        white_RT = whiten(raw_RT, mask_RT, group=self.layout.dp_group, count=count)
        return {sample.sample_id: row[: len(r)] for sample, row, r in zip(samples, white_RT, rewards)}

    def shares(self, rollouts, texts):
        """Factors, one for the rollouts' losses and one for the text's, that make Σ/(all tokens) the sum of their token means."""
        tokens = [sum(batch.num_supervised for batch in part) for part in (rollouts, texts)]
        counts = self.layout.sum_over_data_parallel(torch.tensor(tokens, device=torch.cuda.current_device())).tolist()
        return [sum(counts) / max(1, count) for count in counts]
