"""MiniLLM's policy gradient (Gu et al. 2024, arXiv 2306.08543) on whole responses.

R responses of at most T tokens, padded; `mask` is 1 on the tokens of a response, EOS included. N such tokens in a row.

    r_t = clip((log p(y_t) − log q_old(y_t)) / scale)      what the teacher thinks of a token, against the student that wrote it
    G_t = Σ_{k≥t} γ^{k−t} r_k,   A_t = G_t / n_t            n_t tokens from t to the end: long responses gain nothing by length
    w_t = q_old / ((1 − α) q_old + α p)                     the token was drawn from the mixture, the gradient is the student's
    ρ_t = w_t · q / q_old
    L   = mean_t max(−A_t ρ_t, −A_t clip(ρ_t, 1 − ε, 1 + ε))
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def token_rewards(log_p: Tensor, log_q: Tensor, *, scale: float, limit: float) -> Tensor:
    """r_t. The reference's `--reward-scaling` divides, and so does `scale`."""
    return ((log_p - log_q) / scale).clamp(-limit, limit)


def importance_weights(log_p: Tensor, log_q: Tensor, *, alpha: float) -> Tensor:
    """w_t, without under- or overflow: 1 / ((1 − α) + α p/q)."""
    return 1 / ((1 - alpha) + alpha * (log_p - log_q).exp())


def advantages(rewards_RT: Tensor, mask_RT: Tensor, *, gamma: float, length_norm: bool = True) -> Tensor:
    """A_t, and 0 behind a response's end."""
    rewards_RT = rewards_RT * mask_RT
    returns, later = torch.empty_like(rewards_RT), torch.zeros_like(rewards_RT[:, 0])
    for t in reversed(range(rewards_RT.shape[1])):
        later = rewards_RT[:, t] + gamma * later
        returns[:, t] = later
    remaining_RT = mask_RT.long().flip(1).cumsum(1).flip(1)  # of whole numbers: torch has no deterministic one of others
    return returns * mask_RT / (remaining_RT.clamp(min=1) if length_norm else 1)


def whiten(values_RT: Tensor, mask_RT: Tensor, *, group: ProcessGroup | None = None, count: int | None = None) -> Tensor:
    """Mean 0 and variance 1 over the masked values of all ranks in `group`; masked-out values become 0.

    `count` puts another number than the mask's in the denominators: the reference counts padding, as values of 0.
    """
    values_RT = values_RT.double() * mask_RT
    sums = torch.stack(
        [values_RT.sum(), (values_RT**2).sum(), mask_RT.double().sum() if count is None else mask_RT.new_tensor(count).double()]
    )
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
    mean, square = sums[0] / sums[2], sums[1] / sums[2]
    return ((values_RT - mean) * (square - mean**2 + 1e-8).rsqrt() * mask_RT).float()


def clipped_policy_loss(log_q_N: Tensor, old_log_q_N: Tensor, advantages_N: Tensor, weights_N: Tensor, *, clip: float) -> Tensor:
    """Per token, with gradient to log q. The importance weight is inside the clipped ratio, as in the reference."""
    ratio_N = (log_q_N - old_log_q_N).exp() * weights_N
    return torch.maximum(-advantages_N * ratio_N, -advantages_N * ratio_N.clamp(1 - clip, 1 + clip))
