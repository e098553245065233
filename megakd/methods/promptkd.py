"""PromptKD (Kim et al. 2024, arXiv 2402.12842): a teacher that learns, by a soft prompt, to speak so that the student follows.

q student, p teacher, p_P teacher with the soft prompt P in front. Each iteration, for one global batch of prompts x:

    (a)  y ~ q(·|x)                                                            the student writes
    (b)  P ← P − η ∇_P [ KL(p_P‖q) + (1 − g/G)·base_coef·KL(p_P‖p) ]            the prompt learns from the student
    (c)  θ ← θ − η ∇_θ   KL(q‖p_P)                                             the student learns from the prompted teacher

over the tokens of y with its EOS; g counts iterations up to G. P in (c) is the one that (b) has just updated. The data's own
responses are never read.
"""

from functools import partial

from megakd.losses.distillation import prompt_loss, reverse_kl_loss
from megakd.methods.base import Method, to_floats
from megakd.methods.rollout import rollout
from megakd.models.soft_prompt import SoftPrompt
from megakd.optimizer import SoftPromptOptimizer
from megakd.schedules import forward_backward
from megakd.teachers.live import LiveStudent, SoftPromptedTeacher


class PromptKD(Method):
    """Two learners in turn: the soft prompt, then the student."""

    on_policy = True

    def __init__(self, inputs, config, *, total_iters):
        super().__init__(inputs, config, total_iters=total_iters)
        self.prompt = initial_prompt(self.teacher.model, config, self.tokenizer)
        self.prompted_teacher = SoftPromptedTeacher(self.teacher.model, self.prompt)
        lr = config.training.lr if config.promptkd.teacher_lr is None else config.promptkd.teacher_lr
        kinds = (config.promptkd.teacher_kld_type, config.promptkd.base_kld_type)
        self.prompt_loss = partial(prompt_loss, vocabulary=self.vocabulary, kinds=kinds)
        self.prompt_optimizer = SoftPromptOptimizer(self.prompt, config.training, lr=lr, total_iters=total_iters)

    def train(self, samples, iteration):
        with self.time("rollout"):
            self.rollouts = self.respond(samples, iteration)
        batches = self.batches(self.rollouts)
        metrics = self.prompt_step(batches, iteration)
        with self.time("teacher"):
            prompted = self.prompted_teacher.read(batches, to=self.layout)
        loss = lambda q, batch, p_P: reverse_kl_loss(q, p_P, self.vocabulary)
        return self.student_step(batches, loss, iteration, context=prompted) | metrics

    def respond(self, samples, iteration):
        """Step (a): y ~ q(·|x)."""
        return rollout(self.student, samples, self.config, self.ends, iteration)

    def prompt_step(self, batches, iteration):
        """Step (b): the teacher's weights are frozen, the student's distribution is a constant."""
        base_coef = self.config.promptkd.base_coef * (1 - iteration / self.total_iters)
        with self.time("teacher"):
            base = self.teacher.read(batches, to=self.layout)
            student = LiveStudent(self.student).read(batches, to=self.layout)  # here the student is who is listened to
        loss = lambda p_P, batch, q_and_p: self.prompt_loss(p_P, *q_and_p, base_coef=base_coef)
        with self.time("prompt_step"):
            read = self.prompted_teacher.text(batches)
            means = self.prompt_gradient(self.normalised(loss, read), read, list(zip(student, base)))
            step = self.prompt_optimizer.step(iteration, means.pop("tokens"))
        return to_floats(means) | step

    def prompt_gradient(self, loss, batches, context):
        """∇_P of the token mean, in `prompt.vectors.grad`; returns what the loss logs, and the `tokens`."""
        self.prompt_optimizer.zero_grad()
        teacher = self.teacher.model
        teacher.train()  # activations are recomputed in training alone; there is no dropout, unless the reference's is asked for
        means = forward_backward(
            teacher, batches, loss, context=context, layout=self.layout, soft_prompt=self.prompt.vectors
        )
        teacher.eval()
        return means

    def extra_tensors(self):
        return self.prompt_optimizer.state_tensors()


def initial_prompt(teacher, config, tokenizer) -> SoftPrompt:
    """The embeddings of --prompt-init-text without special tokens, repeated or cut to --prompt-len; or random vectors."""
    length = config.promptkd.prompt_len
    if config.promptkd.prompt_init == "random":
        return SoftPrompt.random(teacher, length, config.training.seed)
    specials = config.training.reference_compat.special_tokens_in_prompt
    ids = tokenizer.encode(config.promptkd.prompt_init_text, add_special_tokens=specials)
    return SoftPrompt.from_tokens(teacher, ids, length)
