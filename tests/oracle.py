"""The methods computed a second time, iteration by iteration: float64, transformers, autograd, torch.optim.AdamW.

Shares no code with megakd. What is random or decided by a schedule comes from outside: learning rates, noise, orders.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Row = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # prompt, response, and what the teacher reads in the prompt's place


@dataclass(frozen=True)
class Adam:
    """AdamW's numbers; `rates` are the learning rates of iterations 1, 2, ..."""

    rates: Sequence[float]
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float

    def optimizer(self, groups):
        return torch.optim.AdamW(groups, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)


@dataclass(frozen=True)
class SGD:
    """torch's SGD with momentum, in Adam's place."""

    rates: Sequence[float]
    momentum: float
    weight_decay: float
    clip: float

    def optimizer(self, groups):
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum, weight_decay=self.weight_decay)


class Oracle:
    """A student and, for some methods, a teacher, both as transformers models in float64; one call of a method is one iteration.

    `vocab_size` cuts both models' logits to the ids they share; `vectors` [P, H] is PromptKD's soft prompt.
    """

    vocab_size = None

    def __init__(self, student, teacher, adam: Adam | SGD, *, vectors=None, prompt_rates: Sequence[float] = ()):
        self.student = student.double().eval()
        self.teacher = teacher.double().eval().requires_grad_(False) if teacher is not None else None
        self.adam, self.iteration = adam, 0
        params = list(self.student.parameters())
        groups = [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}]
        self.optimizer = adam.optimizer(groups)
        if vectors is not None:
            self.prompt, self.prompt_rates = torch.nn.Parameter(vectors.double().clone()), prompt_rates
            self.prompt_optimizer = adam.optimizer([self.prompt])

    def write(self, mixture, limit: int, noise: Callable, *, temperature: float = 1.0, eos: int = 0) -> list[tuple[int, ...]]:
        """A response to each prompt, drawn from Σ share · softmax(z / T) of `mixture`, models with their shares and the prompts that they
        read, by Gumbel-max; `noise(row, position, V)` [V]."""
        responses = []
        for row in range(len(mixture[0][-1])):
            response = []
            while len(response) < limit and eos not in response:
                with torch.no_grad():
                    read = [(share, model(torch.tensor([[*prompts[row], *response]])).logits[0, -1]) for model, share, prompts in mixture]
                    mixed = sum(share * (z[: self.vocab_size] / temperature).softmax(-1) for share, z in read).log()
                response.append((mixed + noise(row, len(response), len(mixed))).argmax().item())
            responses.append(tuple(response))
        return responses

    def sft(self, samples):
        total, tokens = 0.0, 0
        for prompt, response, _ in samples:
            total = total + self.nll(prompt, response).sum()
            tokens += len(response)
        return {"loss/lm": total / tokens} | self.update_student(total / tokens)

    def kd(self, samples, kd_ratio, objective="forward_kl", temperature=1.0, beta=0.5, alpha=0.1):
        lm = distance = 0.0
        tokens = sum(len(response) for _, response, _ in samples)
        for prompt, response, primed in samples:
            log_q, log_p = (logits_at.div(temperature).log_softmax(-1) for logits_at in self.both_logits(prompt, response, primed))
            lm = lm + self.nll(prompt, response).sum()
            distance = distance + divergence(objective, log_p, log_q, beta, alpha).sum()
        total = ((1 - kd_ratio) * lm + kd_ratio * distance) / tokens
        return {"loss/total": total, "loss/lm": lm / tokens, f"loss/{objective}": distance / tokens} | self.update_student(total)

    def both_logits(self, prompt, response, primed):
        read = (self.student, prompt), (self.teacher, primed)
        return [response_logits(model, before, response)[:, : self.vocab_size] for model, before in read]

    def response_priming(self, samples, alpha, temperature, *, original=False):
        """`original`: place by place, what follows the question is never read."""
        lm = distance = tokens = 0.0
        for x, y, z in samples:
            places = min(len(x), len(y), len(z))
            if original:
                q, p = (model(torch.tensor([read])).logits[0, :places] for model, read in ((self.student, x), (self.teacher, z)))
            else:
                (q, p), places = self.both_logits(x, y, z), len(y)
            lm = lm - q.log_softmax(-1)[torch.arange(places), torch.tensor(y[:places])].sum()
            log_q, log_p = (logits.div(temperature).log_softmax(-1) for logits in (q, p))
            distance = distance + (log_q.exp() * (log_q - log_p)).sum()
            tokens += places
        total = (alpha * lm + (1 - alpha) * temperature**2 * distance) / tokens
        found = {"loss/total": total, "loss/lm": lm / tokens, "loss/reverse_kl": distance / tokens, "tokens": tokens}
        return found | self.update_student(total)

    def promptkd(self, samples, base_coef, kinds=("reverse", "reverse")):
        """Also returns the prompt's gradient and its value afterwards."""
        tokens = sum(len(response) for _, response, _ in samples)
        prompt, kd, base = self.prompt, 0.0, 0.0
        kl = {"reverse": lambda a, b: (a.exp() * (a - b)).sum(), "forward": lambda a, b: (b.exp() * (b - a)).sum()}
        for x, y, z in samples:
            log_pp, log_q, log_p = self.log_p(z, y, prompt), self.log_q(x, y).detach(), self.log_p(z, y)
            kd, base = kd + kl[kinds[0]](log_pp, log_q), base + kl[kinds[1]](log_pp, log_p)
        loss = (kd + base_coef * base) / tokens
        self.prompt_optimizer.zero_grad()
        loss.backward()
        gradient = prompt.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_([prompt], self.adam.clip)
        step(self.prompt_optimizer, self.prompt_rates[self.iteration])
        reverse = 0.0
        for x, y, z in samples:
            log_q, log_pp = self.log_q(x, y), self.log_p(z, y, prompt.detach())
            reverse = reverse + (log_q.exp() * (log_q - log_pp)).sum()
        out = {"loss/prompt": loss, "loss/prompt_kd": kd / tokens, "loss/prompt_base": base / tokens, "grad_norm/prompt": norm}
        out |= {"loss/reverse_kl": reverse / tokens} | self.update_student(reverse / tokens)
        return out | {"gradient": gradient, "vectors": prompt.detach().clone()}

    def minillm(self, samples, text, *, alpha, gamma, scale, limit, clip, lm_coef, kd_ratio, old_student, exact=True, length_norm=True):
        """One step on one global batch of responses, written by `old_student`, and one of text; `exact`: with KL(q‖p) of every step."""
        tokens, text_tokens = (sum(len(y) for _, y, _ in part) for part in (samples, text))
        taken = lambda model, x, y: log_probs(model, x, y).gather(1, torch.tensor(y)[:, None])[:, 0]
        raw, kept = [], []
        for x, y, z in samples:
            old, p = taken(old_student, x, y).detach(), taken(self.teacher, z, y)
            reward = ((p - old) / scale).clamp(-limit, limit)
            weight = old.exp() / ((1 - alpha) * old.exp() + alpha * p.exp())
            n = len(y)
            raw.append(torch.stack([sum(gamma ** (k - t) * reward[k] for k in range(t, n)) / (n - t if length_norm else 1) for t in range(n)]))
            kept.append((old, weight))
        every = torch.cat(raw)
        mean, deviation = every.mean(), (every.var(unbiased=False) + 1e-8).sqrt()
        policy = reverse = language = 0.0
        for (x, y, z), advantage, (old, weight) in zip(samples, raw, kept):
            a, ratio = (advantage - mean) / deviation, (taken(self.student, x, y) - old).exp() * weight
            policy = policy + torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).sum()
            log_q, log_p = self.log_q(x, y), self.log_p(z, y)
            reverse = reverse + (log_q.exp() * (log_q - log_p)).sum()
        for x, y, z in text:
            log_q, log_p = self.log_q(x, y), self.log_p(z, y)
            language = language + (1 - kd_ratio) * self.nll(x, y).sum() + kd_ratio * (log_p.exp() * (log_p - log_q)).sum()
        reverse, language = exact * reverse / tokens, language / max(1, text_tokens)
        total = policy / tokens + reverse + lm_coef * language
        parts = {"loss/policy": policy / tokens, "loss/reverse_kl": reverse, "loss/text": language}
        return {"loss/total": total} | parts | self.update_student(total)

    @torch.no_grad()
    def held_out(self, samples):
        """Sums over the tokens: −log q, and KL(q‖p) where there is a teacher; and the tokens."""
        sums = [sum(self.nll(x, y).sum() for x, y, _ in samples)]
        if self.teacher is not None:
            sums.append(sum((self.log_q(x, y).exp() * (self.log_q(x, y) - self.log_p(z, y))).sum() for x, y, z in samples))
        return torch.stack([*sums, torch.tensor(float(sum(len(y) for _, y, _ in samples)))]).tolist()

    def nll(self, prompt, response):
        return F.nll_loss(self.log_q(prompt, response), torch.tensor(response), reduction="none")

    def log_q(self, prompt, response):
        return response_logits(self.student, prompt, response)[:, : self.vocab_size].log_softmax(-1)

    def log_p(self, prompt, response, soft_prompt=None):
        return response_logits(self.teacher, prompt, response, soft_prompt)[:, : self.vocab_size].log_softmax(-1)

    def update_student(self, loss):
        """One step of the student, which ends the iteration."""
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.adam.clip)
        step(self.optimizer, self.adam.rates[self.iteration])
        self.iteration += 1
        return {"grad_norm": norm, "lr": self.adam.rates[self.iteration - 1]}

    def student_now(self):
        """A copy that learns no more."""
        return copy.deepcopy(self.student).requires_grad_(False)


def step(optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def divergence(objective, log_p, log_q, beta, alpha):
    """Per token, p the teacher and q the student."""
    p, q = log_p.exp(), log_q.exp()
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)
    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
        "skew_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, alpha * q + (1 - alpha) * p),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
    }[objective]()


def log_probs(model, prompt, response, soft_prompt=None):
    """log p(· | what precedes each token of the response), [len(response), V]."""
    return response_logits(model, prompt, response, soft_prompt).log_softmax(-1)


def response_logits(model, prompt, response, soft_prompt=None):
    """One row at a time, no padding anywhere."""
    ids = torch.tensor([[*prompt, *response]])[:, :-1]
    if soft_prompt is None:
        logits = model(ids).logits
    else:
        words = model.get_input_embeddings()(ids)
        logits = model(inputs_embeds=torch.cat([soft_prompt[None], words], 1)).logits[:, soft_prompt.shape[0] :]
    return logits[0, len(prompt) - 1 :]


def expert_by_expert(tensors):
    """As transformers writes what it holds as one tensor for all experts."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for number, (gate, up) in enumerate(one.chunk(2) for one in tensor):
                found |= {f"{stem}.{number}.gate_proj.weight": gate, f"{stem}.{number}.up_proj.weight": up}
        elif kind == "down_proj":
            found |= {f"{stem}.{number}.down_proj.weight": one for number, one in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


class StateDictSource:
    """A transformers model or its state dict as the weight source that the models read."""

    def __init__(self, model):
        self.tensors = expert_by_expert(model if isinstance(model, dict) else model.state_dict())

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name, index):
        return self.tensors[name][index]
