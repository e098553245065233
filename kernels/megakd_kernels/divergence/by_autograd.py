"""Any divergence as a RowLoss: its function is differentiated by autograd, a chunk of rows at a time.

In the fused heads the chunk is the heads' own, so that several float32 tensors of one chunk of logits are all that exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..from_logits import RowLoss
from ..shards import log_probs, total
from . import DivergenceFunction

CHUNK_ROWS = 256  # of given logits. By rows and not by memory: every rank must make as many chunks, whatever its width


@dataclass(frozen=True, kw_only=True)
class ByAutograd(RowLoss):
    """Of (student, teacher) logits."""

    reads_once: ClassVar[bool] = True
    function: DivergenceFunction
    temperature: float

    def loss(self, logits_NV: Sequence[Tensor], weights_N: Tensor | None) -> Tensor:
        """[N], without weights."""
        log_q, log_p = (log_probs(z_NV, self.temperature, weights_N, self.shard) for z_NV in logits_NV)
        return self.function(log_q, log_p, total(self.shard))

    def evaluate(self, logits_NV, weights_N):
        loss_N = [self.loss([z[rows] for z in logits_NV], None if weights_N is None else weights_N[rows])
                  for rows in _chunks(len(logits_NV[0]))]
        return (torch.cat(loss_N),), ()

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        for rows in _chunks(len(logits_NV[0])):
            self.at_once([z[rows] for z in logits_NV], scale_N[rows], [None if g is None else g[rows] for g in grads_NV])

    def at_once(self, logits_NV, scale_N, grads_NV):
        leaves = [z.detach().requires_grad_(g is not None) for z, g in zip(logits_NV, grads_NV)]
        with torch.enable_grad():
            loss_N = self.loss(leaves, scale_N)
            computed = iter(torch.autograd.grad(loss_N, [z for z in leaves if z.requires_grad], scale_N.to(loss_N.dtype)))
        for grad_NV in grads_NV:
            if grad_NV is not None:
                grad_NV.copy_(next(computed))
        return (loss_N.detach(),)


def _chunks(rows: int) -> list[slice]:
    return [slice(i, i + CHUNK_ROWS) for i in range(0, max(rows, 1), CHUNK_ROWS)]
