"""PromptKD (Kim et al. 2024, arXiv 2402.12842): a teacher that learns, by a soft prompt, to speak so that the student follows.

q student, p teacher, p_P teacher with the soft prompt P in front. Each iteration, for one global batch of prompts x:

    (a)  y ~ q(·|x)                                                            the student writes
    (b)  P ← P − η ∇_P [ KL(p_P‖q) + (1 − g/G)·base_coef·KL(p_P‖p) ]            the prompt learns from the student
    (c)  θ ← θ − η ∇_θ   KL(q‖p_P)                                             the student learns from the prompted teacher

over the tokens of y with its EOS; g counts iterations up to G. P in (c) is the one that (b) has just updated. The data's own
responses are never read.
"""

import math
from functools import partial

from megakd_kernels import VocabShard

from megakd.faults import check_finite
from megakd.losses.distillation import PROMPT_LOSSES, prompt_loss, reverse_kl_loss
from megakd.methods.base import Method, normalised, to_floats
from megakd.methods.rollout import rollout
from megakd.models.soft_prompt import SoftPrompt
from megakd.optimizer import SoftPromptOptimizer
from megakd.schedules import forward_backward, with_rows_beside
from megakd.teachers.live import LiveTeacher


class PromptKD(Method):
    """Two learners in turn: the soft prompt, then the student."""

    on_policy = True

    def __init__(self, inputs, config, *, total_iters):
        super().__init__(inputs, config, total_iters=total_iters)
        self.learner = self.teacher.attach(PromptLearner, config, prompt_ids(config, self.tokenizer), total_iters)

    def train(self, samples, iteration):
        with self.time("rollout"):
            self.rollouts = self.respond(samples, iteration)
        batches = self.batches(self.rollouts)
        metrics = self.teacher.learn(self.student, batches, iteration, time=self.time)
        check_finite(metrics, batches)
        with self.time("teacher"):
            prompted = self.teacher.read_prompted(batches, to=self.layout)
        loss = lambda q, batch, p_P: reverse_kl_loss(q, p_P, self.vocabulary)
        return self.student_step(batches, loss, iteration, context=prompted) | metrics

    def respond(self, samples, iteration):
        """Step (a): y ~ q(·|x)."""
        return rollout(self.student, samples, self.config, self.ends, iteration)

    def extra_tensors(self):
        return self.teacher.state()

    def soft_prompt(self):
        return self.teacher.state()["vectors"]

    def restore(self, tensors):
        self.teacher.restore(tensors)


class PromptLearner:
    """Step (b), where the teacher lives: its weights are frozen, the student's distribution is a constant."""

    def __init__(self, teacher, config, ids, total_iters):
        self.teacher, self.config, self.total_iters = teacher, config, total_iters
        settings, training = config.promptkd, config.training
        self.prompt = initial_prompt(teacher, ids, settings.prompt_len, training.seed)
        lr = training.lr if settings.teacher_lr is None else settings.teacher_lr
        self.optimizer = SoftPromptOptimizer(self.prompt, training, lr=lr, total_iters=total_iters)
        vocabulary = VocabShard(teacher.real_vocab_size, tp_group=teacher.layout.tp_group)
        self.loss = partial(prompt_loss, vocabulary=vocabulary, kinds=(settings.teacher_kld_type, settings.base_kld_type))

    @property
    def soft_prompt(self):
        """P, [prompt positions, H]."""
        return self.prompt.vectors

    def step(self, batches, student_rows, iteration, *, time):
        """One AdamW step of P; what the loss logs."""
        base_coef = self.config.promptkd.base_coef * (1 - iteration / self.total_iters)
        read_base = partial(LiveTeacher(self.teacher).read, to=self.teacher.layout)
        with time("teacher"):
            context = with_rows_beside(batches, student_rows, read_base)
        loss = lambda p_P, batch, q_and_p: self.loss(p_P, *q_and_p, base_coef=base_coef)
        with time("prompt_step"):
            means = self.gradient(normalised(loss, batches, self.config, self.teacher.layout), batches, context)
            norm = self.optimizer.clip(means.pop("tokens"))
            numbers = to_floats(means | {"grad_norm/prompt": norm.double()})  # in one look at the device
            if math.isfinite(numbers["grad_norm/prompt"]):
                self.optimizer.step(iteration)
        return numbers

    def gradient(self, loss, batches, context):
        """∇_P of the token mean, in `prompt.vectors.grad`; returns what the loss logs, and the `tokens`."""
        self.optimizer.zero_grad()
        self.teacher.train()  # activations are recomputed in training alone; there is no dropout, unless the reference's is asked for
        means = forward_backward(
            self.teacher, batches, loss, context=context, layout=self.teacher.layout, soft_prompt=self.soft_prompt, names=PROMPT_LOSSES
        )
        self.teacher.eval()
        return means

    def state_tensors(self):
        """P and its moments by name."""
        return self.optimizer.state_tensors()


def prompt_ids(config, tokenizer):
    """Those of --prompt-init-text; None where P begins with random vectors."""
    if config.promptkd.prompt_init == "random":
        return None
    specials = config.training.reference_compat.special_tokens_in_prompt
    return tokenizer.encode(config.promptkd.prompt_init_text, add_special_tokens=specials)


def initial_prompt(teacher, ids, length, seed) -> SoftPrompt:
    """The embeddings of the ids, repeated or cut to `length`; without ids random vectors."""
    return SoftPrompt.random(teacher, length, seed) if ids is None else SoftPrompt.from_tokens(teacher, ids, length)
