"""MiniLLM (Gu et al. 2024, arXiv 2306.08543): reverse KL over whole responses by policy gradient.

A phase begins with `num_rollouts` responses drawn from (1 − α) q + α p; `ppo_epochs` passes over them follow, one global batch an
iteration. What the phase needs of the teacher and of the student that wrote is computed once, when it begins:

    L = L_policy (losses/policy_gradient.py)  +  mean_t KL(q‖p)  +  lm_coef · [(1 − r) CE + r KL(p‖q)] on text

The second term is the exact gradient of each single step (the paper's regularisation), the third keeps the student's language. All
three are token means over the global batch; advantages are whitened over its valid tokens.
"""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megakd.data.dataloader import DataLoader
from megakd.data.open_data import open_responses
from megakd.generation.mixture import MixtureComponent
from megakd.losses.distillation import Divergence, function_of_log_q, kd_loss, label_loss, reverse_kl_loss
from megakd.losses.policy_gradient import advantages, clipped_policy_loss, importance_weights, token_rewards, whiten
from megakd.losses.token_loss import HeadRows, TokenLoss
from megakd.methods.base import Method
from megakd.methods.kd import USUAL_RATIO
from megakd.methods.rollout import rollout
from megakd.teachers.live import LiveStudent

TERMS = ("policy", "reverse_kl", "text")


@dataclass(frozen=True)
class Experience:
    """What the last stage remembers of one response of n tokens."""

    old_log_q: Tensor  # [n] of the student that wrote it
    rewards: Tensor  # [n]
    weights: Tensor  # [n]
    teacher_hidden: Tensor  # [n, H]
    advantages: Tensor | None = None  # [n], of the global batch in hand


class MiniLLM(Method):
    """Phases of `steps_per_phase` iterations; `experience` is of the phase in hand and is never saved."""

    on_policy = True
    has_dropout = False  # ρ compares q with the q that wrote: a dropout mask would be read as a change of policy

    def __init__(self, inputs, config, *, total_iters):
        super().__init__(inputs, config, total_iters=total_iters)
        self.settings = config.minillm
        self.batches_per_phase = self.settings.num_rollouts // config.training.global_batch_size
        self.steps_per_phase = self.batches_per_phase * self.settings.ppo_epochs
        self.text = inputs.text

    @classmethod
    def open_text(cls, config, tokenizer, layout, conditioning=None):
        settings, data = config.minillm, config.data
        if not settings.lm_coef:
            return None
        no_response = f"--lm-coef {settings.lm_coef:g} learns it as text: give text with --lm-data, or --lm-coef 0 for prompts alone"
        options = {"conditioning": conditioning, "full_rows": True, "no_response": no_response}
        dataset = open_responses(settings.lm_data or data.train_data, tokenizer, data, **options)
        rows, seed = config.training.global_batch_size, config.training.seed + 1
        return DataLoader(dataset, global_batch_size=rows, seed=seed, dp_rank=layout.dp_rank, dp_size=layout.dp_size)

    def can_be_left_after(self, iteration):
        return iteration % self.steps_per_phase == 0

    def train_iteration(self, loader, iteration):
        phase, step = divmod(iteration - 1, self.steps_per_phase)
        if step == 0:
            first = phase * self.batches_per_phase
            self.begin_phase([s for i in range(self.batches_per_phase) for s in loader.samples(first + i)], iteration)
        text = self.text.samples(iteration - 1) if self.text else []
        return self.learn(self.chosen(phase, step), text, iteration)

    def begin_phase(self, samples, iteration):
        """Write the responses, and remember log q, r, w and the teacher's hidden states of every token."""
        with self.time("rollout"), self.teacher.on_device():
            teachers = [self.component(samples)] if self.settings.teacher_mixed_alpha else []
            self.rollouts = rollout(self.student, samples, self.config, self.ends, iteration, mix_with=teachers)
        self.numbered = [replace(sample, sample_id=number) for number, sample in enumerate(self.rollouts)]
        batches, self.experience = self.batches(self.numbered), {}
        teacher = list(self.read_teacher(batches))
        with self.time("old_log_q"):
            student = LiveStudent(self.student).read(batches, to=self.layout)  # as it was when it wrote
        for batch, p, q in zip(batches, teacher, student):
            self._remember(batch, p, q)

    def component(self, samples):
        """The teacher's share of the distribution that is sampled from, each row behind what it reads."""
        prompts = [sample.for_teacher.prompt for sample in samples]
        return MixtureComponent(self.teacher.model, self.settings.teacher_mixed_alpha, prompts=prompts)

    @torch.no_grad()
    def _remember(self, batch, p, q):
        self.teacher_head = p.head_VpH
        settings, labels = self.settings, batch.supervised_labels
        log_p, log_q = (-label_loss(rows, labels, self.vocabulary) for rows in (p, q))
        rewards = token_rewards(log_p, log_q, scale=settings.reward_scaling, limit=settings.cliprange_reward)
        weights = importance_weights(log_p, log_q, alpha=settings.teacher_mixed_alpha)
        parts = (x.split(batch.response_lengths.tolist()) for x in (log_q, rewards, weights, p.hidden_NH))
        for number, *of_response in zip(batch.sample_ids.tolist(), *parts):
            self.experience[number] = Experience(*of_response)

    def chosen(self, phase, step):
        """This replica's share of one iteration: every epoch is a fresh order of the phase's responses."""
        epoch, position = divmod(step, self.batches_per_phase)
        order = np.random.default_rng((self.config.training.seed, phase, epoch)).permutation(len(self.numbered))
        size = len(self.numbered) // self.batches_per_phase
        return [self.numbered[i] for i in order[position * size : (position + 1) * size]]

    def learn(self, samples, text, iteration):
        """One optimizer step on micro-batches of rollouts and of text together, each with its own loss."""
        rollouts, texts = self.batches(samples), self.batches(text)
        of_rollouts, of_text = self.shares(rollouts, texts)
        remembered = self.recall(samples, rollouts)
        teacher_on_text = list(self.read_teacher(texts)) if texts else []
        losses = [partial(self.policy_loss, experience=experience, share=of_rollouts) for experience in remembered]
        losses += [partial(self.text_loss, p=p, share=of_text) for p in teacher_on_text]
        return self.student_step(rollouts + texts, lambda q, batch, loss: loss(q, batch), iteration, context=losses)

    def policy_loss(self, q, batch, *, experience, share):
        """L_policy and, unless --no-single-step-reg, KL(q‖p): [N] over the tokens of rollouts."""
        objective = lambda log_q: clipped_policy_loss(
            log_q, experience.old_log_q, experience.advantages, experience.weights, clip=self.settings.cliprange
        )
        policy = function_of_log_q(objective, q, batch.supervised_labels, self.vocabulary)
        if not self.settings.single_step_reg:
            return logged(policy, policy=policy).scaled(share)
        p = HeadRows(experience.teacher_hidden, self.teacher_head)
        single_step = reverse_kl_loss(q, p, self.vocabulary).objective_N
        return logged(policy + single_step, policy=policy, reverse_kl=single_step).scaled(share)

    def text_loss(self, q, batch, *, p, share):
        """lm_coef · [(1 − r) CE + r KL(p‖q)]: [N] over the tokens of text."""
        ratio, divergence = self.config.distillation.ratio(USUAL_RATIO), Divergence("forward_kl")
        text = kd_loss(q, p, batch.supervised_labels, self.vocabulary, kd_ratio=ratio, divergence=divergence).objective_N
        return logged(self.settings.lm_coef * text, text=text).scaled(share)

    def recall(self, samples, batches):
        """What is remembered of each micro-batch's tokens, with A_t over `samples`; on the last stage, which alone remembers."""
        if not self.experience:
            return []
        kept = {number: replace(self.experience[number], advantages=a) for number, a in self.advantages_of(samples).items()}
        return [concatenated([kept[number] for number in batch.sample_ids.tolist()]) for batch in batches]

    def advantages_of(self, samples):
        """Whitened A_t of every response by its number."""
        rewards = [self.experience[sample.sample_id].rewards for sample in samples]
        rewards_RT = pad_sequence(rewards, batch_first=True)
        mask_RT = pad_sequence([torch.ones_like(r) for r in rewards], batch_first=True)
        raw_RT = advantages(rewards_RT, mask_RT, gamma=self.settings.gamma, length_norm=self.settings.length_norm)
        count = len(samples) * self.config.max_new_tokens if self.config.training.reference_compat.whiten_padding else None
        white_RT = whiten(raw_RT, mask_RT, group=self.layout.dp_group, count=count)
        return {sample.sample_id: row[: len(r)] for sample, row, r in zip(samples, white_RT, rewards)}

    def shares(self, rollouts, texts):
        """Factors, one for the rollouts' losses and one for the text's, that make Σ/(all tokens) the sum of their token means; scalars
        on the device."""
        tokens = [sum(batch.num_supervised for batch in part) for part in (rollouts, texts)]
        counts = self.layout.sum_over_data_parallel(torch.tensor(tokens).to(self.layout.device, non_blocking=True)).double()
        return [counts.sum() / count.clamp(min=1) for count in counts]


def concatenated(responses: list[Experience]) -> Experience:
    """Several responses, token after token."""
    return Experience(*(torch.cat(parts) for parts in zip(*(vars(response).values() for response in responses))))


def logged(objective_N: Tensor, **terms: Tensor) -> TokenLoss:
    """The loss with all four of MiniLLM's terms in the log, 0 where it has none: rollouts and text are averaged together."""
    zero = torch.zeros_like(objective_N)
    return TokenLoss(objective_N, {"loss/total": objective_N} | {f"loss/{name}": terms.get(name, zero) for name in TERMS})
