"""What goes into a loss and what comes out of it, for the N supervised positions of a micro-batch.

A model's distributions come as HeadRows, exact, as LogitRows where they were stored so, or as megakd_kernels' TopKRows: K tokens, and
the mass of the rest in one bucket.

N supervised positions, H hidden size, Vp vocabulary columns of this rank, padding among them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakd_kernels import TopKRows
from torch import Tensor


@dataclass(frozen=True)
class HeadRows:
    """Exact rows: the loss applies the output layer in chunks, so that [N, vocabulary] need not exist."""

    hidden_NH: Tensor  # whole and equal on every tensor-parallel rank, and so is its gradient
    head_VpH: Tensor  # this rank's rows of the output layer

    def detached(self) -> HeadRows:
        """The same as constants."""
        return HeadRows(self.hidden_NH.detach(), self.head_VpH.detach())


@dataclass(frozen=True)
class LogitRows:
    """Exact rows that are there already: constants."""

    logits_NVp: Tensor  # this rank's columns


Rows = HeadRows | LogitRows | TopKRows


@dataclass(frozen=True)
class TokenLoss:
    """A loss per token: what is minimised, and what of it is logged, `loss/<name>`. All are [N]; means are taken once, over the
    tokens of the global batch."""

    objective_N: Tensor
    logs: dict[str, Tensor]

    def scaled(self, factor: float | Tensor) -> TokenLoss:
        """Objective and logs times one number."""
        return TokenLoss(self.objective_N * factor, {name: value * factor for name, value in self.logs.items()})
