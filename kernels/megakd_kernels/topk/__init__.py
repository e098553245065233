"""Divergences from a truncated teacher: K tokens with their probabilities, and the mass of all others in one bucket.

    buckets  1 ... K            the tokens `ids`               log p_k as stored     log q_k of the student
             rest               every other token together     log p_rest            log q_rest = logsumexp of their log q

Any divergence of `divergence`, between the two distributions over K + 1 buckets. It bounds that of the whole vocabulary from below
(data processing), and equals it where the rest is empty. The student's gradient reaches all columns: those of the rest share theirs
by q. Where the teacher's rest is empty and the student's is not, a reverse KL is infinite: beyond 1e20, never NaN.

What it can be too low by is a number. For a and b with the masses a_r and b_r in the rest R:

    KL(a‖b) − KL over buckets  =  Σ_R a log(a/b) − a_r log(a_r/b_r)  ≤  a_r [ log max_R a − log min_R b − log(a_r/b_r) ]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..shards import VocabShard


@dataclass(frozen=True)
class TopKRows:
    """A teacher's N rows, at temperature 1. `log_rest_N` is the log of the mass outside `ids_NK`, -inf where there is none.

    `log_min_N`, the log of the least probable token, is for the bound of the reverse KL alone, which is infinite without it.
    """

    ids_NK: Tensor
    log_probs_NK: Tensor
    log_rest_N: Tensor
    log_min_N: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids_NK)

    def __getitem__(self, rows: slice | Tensor) -> TopKRows:
        log_min_N = None if self.log_min_N is None else self.log_min_N[rows]
        return TopKRows(self.ids_NK[rows], self.log_probs_NK[rows], self.log_rest_N[rows], log_min_N)

    def check(self, rows: int, shard: VocabShard) -> None:
        """ValueError (on a GPU, of ids, a late error from the device) unless these are `rows` rows of distinct tokens."""
        shapes = [tuple(x.shape) for x in (self.ids_NK, self.log_probs_NK, self.log_rest_N)]
        if self.ids_NK.ndim != 2 or shapes != [shapes[0], shapes[0], shapes[0][:1]] or shapes[0][0] != rows:
            raise ValueError(f"TopKRows has ids {shapes[0]}, log_probs {shapes[1]} and log_rest {shapes[2]} for {rows} rows: "
                             f"give [{rows}, K], [{rows}, K] and [{rows}]")
        if self.ids_NK.is_floating_point() or self.ids_NK.dtype == torch.bool:
            raise ValueError(f"TopKRows' ids are {self.ids_NK.dtype}: give token ids as integers")
        ids_NK = self.ids_NK.sort(-1).values
        _require((ids_NK[:, 1:] != ids_NK[:, :-1]).all(), "TopKRows has a row with the same id twice: its mass would count twice")
        end = torch.iinfo(torch.int64).max if shard.valid_vocab is None else shard.valid_vocab
        _require(((ids_NK >= 0) & (ids_NK < end)).all(), f"TopKRows has an id outside the vocabulary of {end} tokens")


def _require(holds: Tensor, message: str) -> None:
    if holds.is_cuda:
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)
