"""The embedding with a soft prompt in front in plain, differentiable torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..shards import VocabShard


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
