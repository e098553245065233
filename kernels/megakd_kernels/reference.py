"""Every operator of this package in plain, differentiable torch: what the others are tested against, in float64 too.

    q = softmax(student / T), p = softmax(teacher / T), one row a token, no factor T^2:
    reverse_kl       KL(q || p)                            forward_kl        KL(p || q)
    skew_forward_kl  KL(p || alpha p + (1 - alpha) q)      skew_reverse_kl   KL(q || alpha q + (1 - alpha) p)
    jsd              beta KL(p || m) + (1 - beta) KL(q || m),  m = beta p + (1 - beta) q
    tvd              1/2 sum |q - p|

N rows (tokens), V columns of this rank, H hidden size, B batch, S sequence, P soft-prompt rows. Tensors are vocabulary shards
over `tp_group`; columns at or past `valid_vocab` have no probability in any model and get a gradient of zero. `weights` [N]
multiply the rows' losses; a row of weight 0 has loss and gradient 0 whatever it holds. Losses are float32 (float64 of float64).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .shards import FLOOR, CopyToShards, SumOverShards, VocabShard

OBJECTIVES = ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")


def check_objective(objective: str, beta: float, alpha: float, temperature: float) -> None:
    """ValueError for what no formula above covers."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown; use one of {', '.join(OBJECTIVES)}")
    if objective == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta={beta} must lie between 0 and 1 for jsd; use forward_kl or reverse_kl at its ends")
    if objective.startswith("skew") and not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1 for {objective}; use {objective[5:]} for alpha = 0")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")


class _LogSoftmax(torch.autograd.Function):
    """log_softmax over all shards, with dz = dy - softmax(z) * (sum of dy over all shards)."""

    @staticmethod
    def forward(ctx, z_NV: Tensor, shard: VocabShard) -> Tensor:
        floor_N1 = z_NV.new_full((z_NV.shape[0], 1), FLOOR)  # a shard may be empty, or hold -inf only
        z_NV = z_NV - shard.all_reduce(torch.cat([z_NV, floor_N1], dim=-1).amax(-1, keepdim=True), "max")
        log_probs_NV = (z_NV - shard.all_reduce(z_NV.exp().sum(-1, keepdim=True)).log()).clamp_min(FLOOR)
        ctx.save_for_backward(log_probs_NV)
        ctx.shard = shard
        return log_probs_NV

    @staticmethod
    def backward(ctx, grad_NV: Tensor):
        (log_probs_NV,) = ctx.saved_tensors
        return grad_NV - log_probs_NV.exp() * ctx.shard.all_reduce(grad_NV.sum(-1, keepdim=True)), None


def _log_probs(logits_NV: Tensor, temperature: float, weights_N: Tensor | None, shard: VocabShard) -> Tensor:
    z_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if weights_N is not None:
        z_NV = torch.where((weights_N != 0)[:, None], z_NV, 0.0)  # what a masked row holds, NaN included, stays there
    return _LogSoftmax.apply(z_NV / temperature, shard)


def _kl(log_a_NV: Tensor, log_b_NV: Tensor, shard: VocabShard) -> Tensor:
    return SumOverShards.apply((log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1), shard)


def _mixture(share_of_a: float, log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    return torch.logaddexp(log_a_NV + math.log(share_of_a), log_b_NV + math.log1p(-share_of_a))


def _weighted(loss_N: Tensor, weights_N: Tensor | None) -> Tensor:
    return loss_N if weights_N is None else loss_N * weights_N.to(loss_N.dtype)


def kl_div(student_logits: Tensor, teacher_logits: Tensor, *, objective: str = "reverse_kl", beta: float = 0.5,
           alpha: float = 0.1, temperature: float = 1.0, weights: Tensor | None = None, valid_vocab: int | None = None,
           vocab_start: int | None = None, tp_group: ProcessGroup | None = None, inplace: bool = False) -> Tensor:
    """[N] divergence of each row of [N, Vp] logits. `inplace` is accepted and changes nothing here."""
    check_objective(objective, beta, alpha, temperature)
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    q, p = (_log_probs(z_NV, temperature, weights, shard) for z_NV in shard.cut(student_logits, teacher_logits))
    if objective == "reverse_kl":
        loss_N = _kl(q, p, shard)
    elif objective == "forward_kl":
        loss_N = _kl(p, q, shard)
    elif objective == "jsd":
        m = _mixture(beta, p, q)
        loss_N = beta * _kl(p, m, shard) + (1 - beta) * _kl(q, m, shard)
    elif objective == "skew_forward_kl":
        loss_N = _kl(p, _mixture(alpha, p, q), shard)
    elif objective == "skew_reverse_kl":
        loss_N = _kl(q, _mixture(alpha, q, p), shard)
    else:
        loss_N = SumOverShards.apply((q.exp() - p.exp()).relu().sum(-1), shard)  # 1/2 sum |q - p|: both sum to one
    return _weighted(loss_N, weights)


def promptkd_loss(prompted_logits: Tensor, student_logits: Tensor, base_logits: Tensor | None = None, *,
                  base_coef: float | Tensor, base_delta: Tensor | None = None, temperature: float = 1.0,
                  weights: Tensor | None = None, valid_vocab: int | None = None, vocab_start: int | None = None,
                  tp_group: ProcessGroup | None = None, inplace: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_N, kd_N, base_N): loss = kd + base_coef * base, with gradient to the prompted logits; the parts carry none.

    kd = KL(prompted || student), base = KL(prompted || base). The base teacher comes as logits or as `base_delta`, prompted minus
    base logits; with neither, base is zero.
    """
    check_objective("reverse_kl", 0.5, 0.5, temperature)
    if base_delta is not None:
        base_logits = prompted_logits.to(torch.promote_types(base_delta.dtype, torch.float32)) - base_delta
    others = [x.detach() for x in (student_logits, base_logits) if x is not None]
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    t, s, *b = (_log_probs(z_NV, temperature, weights, shard) for z_NV in shard.cut(prompted_logits, *others))
    kd_N = _weighted(_kl(t, s, shard), weights)
    base_N = _weighted(_kl(t, b[0], shard), weights) if b else torch.zeros_like(kd_N)
    return kd_N + base_coef * base_N, kd_N.detach(), base_N.detach()


def cross_entropy(logits: Tensor, labels_N: Tensor, *, weights: Tensor | None = None, valid_vocab: int | None = None,
                  vocab_start: int | None = None, tp_group: ProcessGroup | None = None, inplace: bool = False) -> Tensor:
    """[N] minus log-probability of each row's label (an index of the whole vocabulary); weight 0 allows any label."""
    shard = VocabShard(valid_vocab, vocab_start, tp_group)
    (z_NV,) = shard.cut(logits)
    start = shard.start(logits.shape[-1])
    here_NV = torch.arange(start, start + z_NV.shape[-1], device=z_NV.device) == labels_N[:, None]
    log_probs_NV = _log_probs(z_NV, 1.0, weights, shard)
    return _weighted(-SumOverShards.apply(torch.where(here_NV, log_probs_NV, 0.0).sum(-1), shard), weights)


def _head(hidden_NH: Tensor, weight_VH: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    return CopyToShards.apply(hidden_NH, VocabShard(tp_group=tp_group)) @ weight_VH.t()


def fused_linear_kl(student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
                    objective: str = "reverse_kl", beta: float = 0.5, alpha: float = 0.1, temperature: float = 1.0,
                    weights: Tensor | None = None, valid_vocab: int | None = None, vocab_start: int | None = None,
                    tp_group: ProcessGroup | None = None, chunk_rows: int | None = None,
                    accumulate_into_main_grad: bool = False) -> Tensor:
    """kl_div of hidden states [N, H] through their heads [Vp, H]; `chunk_rows` and main_grad are left to the fused operator."""
    return kl_div(_head(student_hidden, student_weight, tp_group), _head(teacher_hidden, teacher_weight, tp_group),
                  objective=objective, beta=beta, alpha=alpha, temperature=temperature, weights=weights, valid_vocab=valid_vocab,
                  vocab_start=vocab_start, tp_group=tp_group)


def fused_linear_promptkd_loss(prompted_hidden: Tensor, teacher_weight: Tensor, base_hidden: Tensor | None,
                               student_hidden: Tensor, student_weight: Tensor, *, base_coef: float | Tensor,
                               temperature: float = 1.0, weights: Tensor | None = None, valid_vocab: int | None = None,
                               vocab_start: int | None = None, tp_group: ProcessGroup | None = None,
                               chunk_rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """promptkd_loss of hidden states; both heads are frozen, and the teacher and its base share one."""
    teacher_VH, student_VH = teacher_weight.detach(), student_weight.detach()
    base_NV = None if base_hidden is None else _head(base_hidden.detach(), teacher_VH, tp_group)
    return promptkd_loss(_head(prompted_hidden, teacher_VH, tp_group), _head(student_hidden.detach(), student_VH, tp_group),
                         base_NV, base_coef=base_coef, temperature=temperature, weights=weights, valid_vocab=valid_vocab,
                         vocab_start=vocab_start, tp_group=tp_group)


def fused_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels_N: Tensor, *, weights: Tensor | None = None,
                               valid_vocab: int | None = None, vocab_start: int | None = None,
                               tp_group: ProcessGroup | None = None, chunk_rows: int | None = None,
                               accumulate_into_main_grad: bool = False) -> Tensor:
    """cross_entropy of hidden states through their head."""
    return cross_entropy(_head(hidden, weight, tp_group), labels_N, weights=weights, valid_vocab=valid_vocab,
                         vocab_start=vocab_start, tp_group=tp_group)


def prompt_embedding(tokens_BS: Tensor, word_weight: Tensor, prompt_PH: Tensor, position_weight: Tensor | None = None,
                     position_ids: Tensor | None = None, *, vocab_start: int | None = None,
                     tp_group: ProcessGroup | None = None) -> Tensor:
    """[B, P + S, H] in word_weight's dtype: the soft prompt, then the words, plus positions. Gradient to the prompt only.

    `word_weight` [Vp, H] is this rank's shard; `prompt_PH` and `position_weight` [positions, H] are whole on every rank;
    `position_ids` [B, P + S] or [P + S] count from 0 where not given.
    """
    check_frozen(word_weight, position_weight)
    words_BSH = _words(tokens_BS, word_weight, VocabShard(vocab_start=vocab_start, tp_group=tp_group))
    rows, prompt = prompt_PH.shape[0], prompt_PH.to(torch.promote_types(word_weight.dtype, torch.float32))
    if position_weight is not None:
        ids = torch.arange(rows + tokens_BS.shape[1], device=tokens_BS.device) if position_ids is None else position_ids
        positions = position_weight[ids]
        prompt, words_BSH = prompt + positions[..., :rows, :], words_BSH + positions[..., rows:, :]
    prompt_BPH = prompt.expand(tokens_BS.shape[0], -1, -1).to(word_weight.dtype)  # so its gradient is summed in float32
    return torch.cat([prompt_BPH, words_BSH], dim=1)


def _words(tokens_BS: Tensor, word_weight: Tensor, shard: VocabShard) -> Tensor:
    width = word_weight.shape[0]
    row_BS = tokens_BS - shard.start(width)
    if shard.ranks == 1:
        return word_weight[row_BS]
    here_BS = (row_BS >= 0) & (row_BS < width)
    words_BSH = word_weight.new_zeros(*tokens_BS.shape, word_weight.shape[1])
    words_BSH[here_BS] = word_weight[row_BS[here_BS]]
    return shard.all_reduce(words_BSH)


def check_frozen(word_weight: Tensor, position_weight: Tensor | None) -> None:
    """ValueError where a table would silently miss its gradient."""
    for name, table in (("word_weight", word_weight), ("position_weight", position_weight)):
        if table is not None and table.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"prompt_embedding trains the prompt only, but {name} requires a gradient: freeze it or detach it")
