"""Mixtures in plain torch with the gradient written out, a few rows at a time: the CPU's kernels.

A mixture m needs both normalisers first, which are a KL's statistics, and then two more sums, x and y below (q student, p teacher,
r = p q / m):

    jsd              m = beta p + (1 - beta) q       x = sum p log p/m,  y = sum q log q/m        loss = beta x + (1 - beta) y
                     dp = beta p (log p/m - x)       dq = (1 - beta) q (log q/m - y)
    skew, KL(p||m)   m = alpha p + (1 - alpha) q     x = sum p log p/m,  y = sum r                loss = x
                     dp = p (log p/m - x) + (1 - alpha) (r - p y)            dq = -(1 - alpha) (r - q y)
    tvd              x = sum_{q > p} q,  y = sum_{q > p} p,  loss = x - y    dq = q ([q > p] - x)      dp = -p ([q > p] - y)

N rows, V columns here, R rows of one chunk. `triton` has the same functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kl.rows import Merged
from ..row_chunks import accumulation_dtype, clear_inactive, row_chunks, scaled, scratch, write_rows
from ..shards import FLOOR


def sums(q_NV: Tensor, p_NV: Tensor, merged: Merged, *, objective: str, share: float, weights: Tensor | None = None,
                 temperature: float = 1.0) -> Tensor:
    """[2, N]: x and y of this shard. `merged` has student first; `share` is beta or alpha."""
    sums_2N = q_NV.new_zeros(2, q_NV.shape[0], dtype=accumulation_dtype(q_NV))
    buffers = scratch(q_NV, 6)
    for rows in row_chunks(q_NV, None if weights is None else weights != 0):
        log_q, log_p = _log_probs(q_NV, p_NV, merged, rows, temperature, buffers)
        if objective == "skew_reverse_kl":
            log_q, log_p = log_p, log_q  # the same formulas with the models exchanged
        q, p, m, log_m = (buffer[: len(log_q)] for buffer in buffers[2:])
        torch.exp(log_q, out=q), torch.exp(log_p, out=p)
        if objective == "tvd":
            more = q > p
            x, y = (q * more).sum(-1), (p * more).sum(-1)
        else:
            _mixture(p, q, share, m, log_m)
            x = log_p.sub_(log_m).mul_(p).sum(-1)
            y = (log_q.sub_(log_m).mul_(q) if objective == "jsd" else p.mul_(q).div_(m)).sum(-1)
        sums_2N[:, rows] = torch.stack([x, y])
    return sums_2N


def loss(sums_2N: Tensor, *, objective: str, share: float) -> Tensor:
    """[N] divergence from the sums over the whole vocabulary."""
    x, y = sums_2N
    return {"jsd": share * x + (1 - share) * y, "tvd": x - y}.get(objective, x)


def gradient(q_NV: Tensor, p_NV: Tensor, merged: Merged, sums_2N: Tensor, scale_N: Tensor, *, objective: str,
                     share: float, temperature: float = 1.0, grad_q: Tensor | None = None, grad_p: Tensor | None = None) -> None:
    """Write the gradients times scale_N into grad_q (student) and grad_p (teacher), which may be the logits themselves."""
    active_N = scale_N != 0
    buffers = scratch(q_NV, 6)
    swap = objective == "skew_reverse_kl"
    for rows in row_chunks(q_NV, active_N):
        log_q, log_p = _log_probs(q_NV, p_NV, merged, rows, temperature, buffers)
        x, y = sums_2N[:, rows, None]
        others = [buffer[: len(log_q)] for buffer in buffers[2:]]
        dq, dp = _mixture_row_gradients(*((log_p, log_q) if swap else (log_q, log_p)), *others, x, y, objective, share)
        for grad_NV, d in ((grad_p, dq), (grad_q, dp)) if swap else ((grad_q, dq), (grad_p, dp)):
            if grad_NV is not None:
                write_rows(grad_NV, rows, d.mul_(scale_N[rows, None]))
    clear_inactive(active_N, grad_q, grad_p)


def _mixture_row_gradients(log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, m: Tensor, log_m: Tensor, x: Tensor, y: Tensor,
                  objective: str, share: float) -> tuple[Tensor, Tensor]:
    """(dq, dp); q, p, m and log_m are scratch."""
    torch.exp(log_q, out=q), torch.exp(log_p, out=p)
    if objective == "tvd":
        more = torch.gt(q, p, out=m)
        return q.mul_(torch.sub(more, x, out=log_q)), p.mul_(torch.sub(y, more, out=log_p))
    _mixture(p, q, share, m, log_m)
    if objective == "jsd":
        return log_q.sub_(log_m).sub_(y).mul_(q).mul_(1 - share), log_p.sub_(log_m).sub_(x).mul_(p).mul_(share)
    r = torch.mul(p, q, out=log_q).div_(m)
    dp = log_p.sub_(log_m).sub_(x).mul_(p).add_(torch.addcmul(r, p, y, value=-1, out=m), alpha=1 - share)
    return q.mul_(y).sub_(r).mul_(1 - share), dp


def _mixture(p: Tensor, q: Tensor, share: float, m: Tensor, log_m: Tensor) -> None:
    """m, never 0: where both models underflow, log m and p q / m are multiplied by 0 and have to be finite."""
    torch.lerp(q, p, share, out=m).clamp_min_(torch.finfo(p.dtype).tiny)
    torch.log(m, out=log_m)


def _log_probs(q_NV: Tensor, p_NV: Tensor, merged: Merged, rows: slice | Tensor, temperature: float,
               buffers: list[Tensor]) -> tuple[Tensor, Tensor]:
    parts = ((q_NV, merged.top_a, merged.sum_a, buffers[0]), (p_NV, merged.top_b, merged.sum_b, buffers[1]))
    return tuple(scaled(x_NV, rows, temperature, x_).sub_(top_N[rows, None]).sub_(sum_N[rows, None].log()).clamp_min_(FLOOR)
                 for x_NV, top_N, sum_N, x_ in parts)
