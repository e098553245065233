"""The prompt embedding on a CPU: every row gathered straight into its place. The mathematics are in `operator`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shards import VocabShard


def embed(tokens_BS: Tensor, word_VH: Tensor, prompt_PH: Tensor, position_weight: Tensor | None, position_ids: Tensor | None, *,
          shard: VocabShard) -> Tensor:
    """[B, T, H]: this rank's rows, zeros elsewhere. IndexError for a position, and on one rank for a token, without a row."""
    (B, S), (P, H) = tokens_BS.shape, prompt_PH.shape
    out_BTH = word_VH.new_empty(B, P + S, H)
    positions_TH = None
    if position_weight is not None:
        positions_TH = position_weight[torch.arange(P + S) if position_ids is None else position_ids]
    row_BS = tokens_BS - shard.start(len(word_VH))
    here_BS = ((row_BS >= 0) & (row_BS < len(word_VH))) | (shard.ranks == 1)
    for words_SH, row_S in zip(out_BTH[:, P:], row_BS.where(here_BS, 0)):
        if len(word_VH):
            torch.index_select(word_VH, 0, row_S, out=words_SH)
    prompt_PH = prompt_PH.to(torch.promote_types(word_VH.dtype, torch.float32))
    if positions_TH is not None:
        out_BTH[:, P:] += positions_TH[..., P:, :]
        prompt_PH = prompt_PH + positions_TH[..., :P, :]
    out_BTH[:, :P] = prompt_PH if shard.rank == 0 else 0
    if not bool(here_BS.all()):
        out_BTH[:, P:][~here_BS] = 0
    return out_BTH


def prompt_gradient(grad_BTH: Tensor, rows: int) -> Tensor:
    """[P, H] in at least float32: the batch sum of the first rows."""
    return grad_BTH[:, :rows].sum(0, dtype=torch.promote_types(grad_BTH.dtype, torch.float32))
