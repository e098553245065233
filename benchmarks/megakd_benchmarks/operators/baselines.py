"""What others write. Each loss takes its logits (the first requires a gradient) and returns its sum."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megakd_kernels import launch
from torch import Tensor


def promptkd_formula(s: Tensor, t: Tensor) -> Tensor:
    """Reverse KL as PromptKD's distillation code writes it: probabilities in float32, infinities masked, summed twice."""
    q = F.softmax(s, dim=-1, dtype=torch.float32)
    teacher = torch.masked_fill(q * F.log_softmax(t, dim=-1, dtype=torch.float32), torch.isinf(t), 0)
    student = torch.masked_fill(q * F.log_softmax(s, dim=-1, dtype=torch.float32), torch.isinf(s), 0)
    return (student - teacher).sum()


def minimal(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) in one line of autograd."""
    log_a, log_b = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    return (log_a.exp() * (log_a - log_b)).sum()


def jsd(s: Tensor, t: Tensor) -> Tensor:
    """JSD(0.5) by torch's kl_div, from log-probabilities."""
    log_q, log_p = F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0))
    return 0.5 * sum(F.kl_div(log_m, log_x, reduction="sum", log_target=True) for log_x in (log_q, log_p))


def two_passes(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Reverse KL and its gradient in the form that torch.compile fuses best: statistics, then gradient."""
    a, b = s.float(), t.float()
    top_a, top_b = a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)
    e = (a - top_a).exp()
    sum_a, sum_b = e.sum(-1, keepdim=True), (b - top_b).exp().sum(-1, keepdim=True)
    kl = (e * ((a - top_a) - (b - top_b))).sum(-1, keepdim=True) / sum_a - sum_a.log() + sum_b.log()
    x = a - (top_a + sum_a.log())
    return kl.sum(), (x.exp() * (x - (b - (top_b + sum_b.log())) - kl)).to(s.dtype)


def prompt_two_passes(t: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) + 0.7 KL(t || b) and its gradient, in the same form."""
    log_t, log_s, log_b = (x - x.logsumexp(-1, keepdim=True) for x in (t.float(), s.float(), b.float()))
    p, ratio = log_t.exp(), (log_t - log_s) + 0.7 * (log_t - log_b)
    loss = (p * ratio).sum(-1, keepdim=True)
    return loss.sum(), (p * (ratio - loss)).to(t.dtype)


def jsd_two_passes(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """JSD(0.5) and its gradient, in the same form."""
    log_q, log_p = (x - x.logsumexp(-1, keepdim=True) for x in (s.float(), t.float()))
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0))
    y = (log_q.exp() * (log_q - log_m)).sum(-1, keepdim=True)
    loss = 0.5 * ((log_p.exp() * (log_p - log_m)).sum() + y.sum())
    return loss, (0.5 * log_q.exp() * (log_q - log_m - y)).to(s.dtype)


def by_autograd(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(loss, gradient of the first input)"""
    def run(first: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        leaf = first.detach().requires_grad_()
        value = loss(leaf, *others)
        value.backward()
        return value.detach(), leaf.grad
    return run


def chosen(implementation: str, loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same, by the implementation that `launch.use` takes."""
    run = by_autograd(loss)

    def inside(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with launch.use(implementation):
            return run(*inputs)
    return inside


def megakd(loss: Callable[..., Tensor], device: str, option: bool = True) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """Ours as it comes, and by the option that the divergences have on a CPU."""
    ours = {"megakd": by_autograd(loss)}
    if option and device == "cpu":
        ours["megakd, compiled"] = chosen("compiled", loss)
    return ours


def liger_reverse_kl() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Liger's JSD at beta = 1 is the reverse KL, from log-probabilities; None where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.jsd import LigerJSD

    loss = LigerJSD(beta=1.0)
    return by_autograd(lambda s, t: loss(F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)) * s.shape[0])
