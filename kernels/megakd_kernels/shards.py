"""What one rank holds of a vocabulary, and the collectives that make the shards one.

Ranks of `tp_group` hold contiguous column ranges in rank order; `tp_group=None` is one rank that holds everything.
N rows (tokens), Vp columns on this rank, K statistics a row, P partial statistics (vocabulary splits of this rank).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FLOOR = -1.0e30  # stands for log 0: its exponential is exactly 0, and products with it stay finite
OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX} if dist.is_available() else {}


@dataclass(frozen=True)
class VocabShard:
    """This rank's part: columns at or past `valid_vocab` are padding; `vocab_start` defaults to rank * width (equal shards)."""

    valid_vocab: int | None = None
    vocab_start: int | None = None
    tp_group: dist.ProcessGroup | None = None

    @property
    def arguments(self) -> dict:
        """Keywords of the losses."""
        return {"valid_vocab": self.valid_vocab, "vocab_start": self.vocab_start, "tp_group": self.tp_group}

    @property
    def ranks(self) -> int:
        """1 without a group."""
        return 1 if self.tp_group is None else dist.get_world_size(self.tp_group)

    @property
    def rank(self) -> int:
        """Place in the group; 0 without one."""
        return 0 if self.tp_group is None else dist.get_rank(self.tp_group)

    def start(self, width: int) -> int:
        """The vocabulary index of the first of `width` columns."""
        return self.rank * width if self.vocab_start is None else self.vocab_start

    def columns(self, width: int) -> int:
        """How many of `width` columns stand for a token."""
        return width if self.valid_vocab is None else min(width, max(0, self.valid_vocab - self.start(width)))

    def cut(self, *tensors_NV: Tensor) -> list[Tensor]:
        """Views of the same real columns of each tensor. ValueError where the models' shards do not line up."""
        widths = [x.shape[-1] for x in tensors_NV]
        if len(set(widths)) > 1 and (self.valid_vocab is None or (self.vocab_start is None and self.ranks > 1)):
            raise ValueError(f"the models' vocabulary shards are {widths} columns wide: pad both to one width, or pass "
                             "valid_vocab (under tensor parallelism also vocab_start, with shards that start at one token)")
        columns = [self.columns(width) for width in widths]
        if len(set(columns)) > 1:
            raise ValueError(f"valid_vocab={self.valid_vocab} leaves {columns} columns of the models on this rank: it must not "
                             "exceed the smaller vocabulary")
        return [x[:, : columns[0]] for x in tensors_NV]

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """x reduced over the ranks by "sum" or "max", in place."""
        if self.ranks > 1:
            dist.all_reduce(x, op=OPS[op], group=self.tp_group)
        return x

    def all_gather(self, stats_PKN: Tensor) -> Tensor:
        """[ranks * P, K, N], rank after rank: one collective, and the same bits on every rank."""
        if self.ranks == 1:
            return stats_PKN
        gathered = stats_PKN.new_empty(self.ranks * stats_PKN.shape[0], *stats_PKN.shape[1:])
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
        gather(gathered, stats_PKN.contiguous(), group=self.tp_group)
        return gathered


def merge_sums(top_PN: Tensor, sum_PN: Tensor) -> tuple[Tensor, Tensor]:
    """Parts' maxima A and sums of e^(z - A) as those of whole rows, [N] each."""
    top_N = top_PN.amax(0)
    return top_N, ((top_PN - top_N).exp() * sum_PN).sum(0)


class SumOverShards(torch.autograd.Function):
    """Forward: all-reduce. Backward: identity, because what follows is the same on every rank."""

    @staticmethod
    def forward(ctx, x: Tensor, shard: VocabShard) -> Tensor:
        return shard.all_reduce(x.clone())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class CopyToShards(torch.autograd.Function):
    """Forward: identity. Backward: all-reduce, because every rank adds its columns' share of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard = shard
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.shard.all_reduce(grad.clone(memory_format=torch.contiguous_format)), None


class LogSoftmax(torch.autograd.Function):
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


def log_probs(logits_NV: Tensor, temperature: float, weights_N: Tensor | None, shard: VocabShard) -> Tensor:
    """[N, Vp] float32 (float64 of float64) log-probabilities, differentiable; a row of weight 0 is not read."""
    z_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    if weights_N is not None:
        z_NV = torch.where((weights_N != 0)[:, None], z_NV, 0.0)  # what a masked row holds, NaN included, stays there
    return LogSoftmax.apply(z_NV / temperature, shard)


def total(shard: VocabShard) -> Callable[[Tensor], Tensor]:
    """The function that sums [N, Vp] over the whole vocabulary, to [N] on every rank, differentiable."""
    return lambda x_NV: SumOverShards.apply(x_NV.sum(-1), shard)


def weighted(loss_N: Tensor, weights_N: Tensor | None) -> Tensor:
    """The rows' losses times their weights."""
    return loss_N if weights_N is None else loss_N * weights_N.to(loss_N.dtype)


def check_temperature(temperature: float) -> None:
    """ValueError unless logits can be divided by it."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
