"""One iteration of each method computed a second time: float64, transformers, autograd, torch.optim.AdamW. Shares no code with megakd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ADAM = {"betas": (0.9, 0.999), "eps": 1e-3}  # a large epsilon: the update stays a smooth function of the gradient


class Oracle:
    """A student and, for some methods, a teacher, both as transformers models in float64; samples are (prompt, response) id lists.

    `vocab_size` cuts both models' logits to the ids they share.
    """

    vocab_size = None

    def __init__(self, student, teacher, *, lr: float, weight_decay: float, clip: float):
        self.student = student.double().eval()
        self.teacher = teacher.double().eval().requires_grad_(False) if teacher is not None else None
        self.lr, self.weight_decay, self.clip = lr, weight_decay, clip

    def sft(self, samples):
        total, tokens = 0.0, 0
        for prompt, response in samples:
            total = total + self.nll(prompt, response).sum()
            tokens += len(response)
        return {"loss/lm": total / tokens} | self.update_student(total / tokens)

    def kd(self, samples, kd_ratio, objective="forward_kl", temperature=1.0, beta=0.5, alpha=0.1):
        lm = distance = 0.0
        tokens = sum(len(response) for _, response in samples)
        for prompt, response in samples:
            log_q, log_p = (logits_at.div(temperature).log_softmax(-1) for logits_at in self.both_logits(prompt, response))
            lm = lm + self.nll(prompt, response).sum()
            distance = distance + divergence(objective, log_p, log_q, beta, alpha).sum()
        total = ((1 - kd_ratio) * lm + kd_ratio * distance) / tokens
        return {"loss/total": total, "loss/lm": lm / tokens, f"loss/{objective}": distance / tokens} | self.update_student(total)

    def both_logits(self, prompt, response):
        return [response_logits(model, prompt, response)[:, : self.vocab_size] for model in (self.student, self.teacher)]

    def promptkd(self, samples, vectors, base_coef):
        """`vectors` [P, H] before the iteration; also returns the prompt's gradient and its value afterwards."""
        tokens = sum(len(response) for _, response in samples)
        prompt = torch.nn.Parameter(vectors.double().clone())
        kd = base = 0.0
        for x, y in samples:
            log_pp, log_q, log_p = self.log_p(x, y, prompt), self.log_q(x, y).detach(), self.log_p(x, y)
            kd = kd + (log_pp.exp() * (log_pp - log_q)).sum()
            base = base + (log_pp.exp() * (log_pp - log_p)).sum()
        loss = (kd + base_coef * base) / tokens
        loss.backward()
        gradient = prompt.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_([prompt], self.clip)
        torch.optim.AdamW([prompt], lr=self.lr, weight_decay=self.weight_decay, **ADAM).step()
        reverse = 0.0
        for x, y in samples:
            log_q, log_pp = self.log_q(x, y), self.log_p(x, y, prompt.detach())
            reverse = reverse + (log_q.exp() * (log_q - log_pp)).sum()
        out = {"loss/prompt": loss, "loss/prompt_kd": kd / tokens, "loss/prompt_base": base / tokens, "grad_norm/prompt": norm}
        out |= {"loss/reverse_kl": reverse / tokens} | self.update_student(reverse / tokens)
        return {name: float(value) for name, value in out.items()} | {"gradient": gradient, "vectors": prompt.detach()}

    def minillm(self, samples, text, *, alpha, gamma, scale, limit, clip, lm_coef, kd_ratio, old_student):
        """One step on one global batch of responses, written by `old_student`, and one of text."""
        tokens, text_tokens = (sum(len(y) for _, y in part) for part in (samples, text))
        taken = lambda model, x, y: log_probs(model, x, y).gather(1, torch.tensor(y)[:, None])[:, 0]
        raw, kept = [], []
        for x, y in samples:
            old, p = taken(old_student, x, y).detach(), taken(self.teacher, x, y)
            reward = ((p - old) / scale).clamp(-limit, limit)
            weight = old.exp() / ((1 - alpha) * old.exp() + alpha * p.exp())
            n = len(y)
            raw.append(torch.stack([sum(gamma ** (k - t) * reward[k] for k in range(t, n)) / (n - t) for t in range(n)]))
            kept.append((old, weight))
        every = torch.cat(raw)
        mean, deviation = every.mean(), (every.var(unbiased=False) + 1e-8).sqrt()
        policy = reverse = language = 0.0
        for (x, y), advantage, (old, weight) in zip(samples, raw, kept):
            a, ratio = (advantage - mean) / deviation, (taken(self.student, x, y) - old).exp() * weight
            policy = policy + torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)).sum()
            log_q, log_p = self.log_q(x, y), self.log_p(x, y)
            reverse = reverse + (log_q.exp() * (log_q - log_p)).sum()
        for x, y in text:
            log_q, log_p = self.log_q(x, y), self.log_p(x, y)
            language = language + (1 - kd_ratio) * self.nll(x, y).sum() + kd_ratio * (log_p.exp() * (log_p - log_q)).sum()
        total = policy / tokens + reverse / tokens + lm_coef * language / text_tokens
        parts = {"loss/policy": policy / tokens, "loss/reverse_kl": reverse / tokens, "loss/text": language / text_tokens}
        return {"loss/total": total} | parts | self.update_student(total)

    def nll(self, prompt, response):
        return F.nll_loss(self.log_q(prompt, response), torch.tensor(response), reduction="none")

    def log_q(self, prompt, response):
        return response_logits(self.student, prompt, response)[:, : self.vocab_size].log_softmax(-1)

    def log_p(self, prompt, response, soft_prompt=None):
        return response_logits(self.teacher, prompt, response, soft_prompt)[:, : self.vocab_size].log_softmax(-1)

    def update_student(self, loss):
        loss.backward()
        params = dict(self.student.named_parameters())
        norm = torch.nn.utils.clip_grad_norm_(params.values(), self.clip)
        decayed = [p for name, p in params.items() if p.ndim > 1]
        others = [p for name, p in params.items() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        torch.optim.AdamW(groups, lr=self.lr, **ADAM).step()
        return {"grad_norm": norm}


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


class StateDictSource:
    """A transformers state dict as the weight source that the models read."""

    def __init__(self, model):
        self.tensors = model.state_dict()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name, index):
        return self.tensors[name][index]
