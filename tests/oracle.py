"""One iteration of each method computed a second time: float64, transformers, autograd, torch.optim.AdamW. Shares no code with megakd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ADAM = {"betas": (0.9, 0.999), "eps": 1e-3}  # a large epsilon: the update stays a smooth function of the gradient


class Oracle:
    """A student and, for some methods, a teacher, both as transformers models in float64; samples are (prompt, response) id lists."""

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

    def kd(self, samples, kd_ratio):
        lm = kl = 0.0
        tokens = sum(len(response) for _, response in samples)
        for prompt, response in samples:
            log_q, log_p = self.log_q(prompt, response), self.log_p(prompt, response)
            lm = lm + self.nll(prompt, response).sum()
            kl = kl + (log_p.exp() * (log_p - log_q)).sum()
        total = ((1 - kd_ratio) * lm + kd_ratio * kl) / tokens
        return {"loss/total": total, "loss/lm": lm / tokens, "loss/forward_kl": kl / tokens} | self.update_student(total)

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

    def nll(self, prompt, response):
        return F.nll_loss(self.log_q(prompt, response), torch.tensor(response), reduction="none")

    def log_q(self, prompt, response):
        return log_probs(self.student, prompt, response)

    def log_p(self, prompt, response, soft_prompt=None):
        return log_probs(self.teacher, prompt, response, soft_prompt)

    def update_student(self, loss):
        loss.backward()
        params = dict(self.student.named_parameters())
        norm = torch.nn.utils.clip_grad_norm_(params.values(), self.clip)
        decayed = [p for name, p in params.items() if p.ndim > 1]
        others = [p for name, p in params.items() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        torch.optim.AdamW(groups, lr=self.lr, **ADAM).step()
        return {"grad_norm": norm}


def log_probs(model, prompt, response, soft_prompt=None):
    """log p(· | what precedes each token of the response), [len(response), V]: one row at a time, no padding anywhere."""
    ids = torch.tensor([[*prompt, *response]])[:, :-1]
    if soft_prompt is None:
        logits = model(ids).logits
    else:
        words = model.get_input_embeddings()(ids)
        logits = model(inputs_embeds=torch.cat([soft_prompt[None], words], 1)).logits[:, soft_prompt.shape[0] :]
    return logits[0, len(prompt) - 1 :].log_softmax(-1)


class StateDictSource:
    """A transformers state dict as the weight source that the models read."""

    def __init__(self, model):
        self.tensors = model.state_dict()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name, index):
        return self.tensors[name][index]
