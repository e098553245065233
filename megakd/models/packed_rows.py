"""Rows one behind the other, without padding between them: megatron-core's PackedSeqParams in its `thd` format, and what else a forward
pass asks of them.

    rows  a b c | d e    behind a soft prompt P Q          P Q a b c | P Q d e | .         S columns
                                         position_ids      0 1 2 3 4   0 1 2 3   0
                                         cu_seqlens        0           5         9   10

Under sequence parallelism columns are cut into equal parts; what is missing at the end is filled up by a row that nobody asks about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedRows(PackedSeqParams):
    """`cu_seqlens_q` and `position_ids` are on the device, and `lengths` on the host."""

    lengths: tuple[int, ...] = ()  # columns of each row, its soft prompt among them
    position_ids: Tensor | None = None  # [S]
    prompted: int = 0  # columns of each row that its soft prompt has
    rows: int = 0  # without the last that only fills up

    @classmethod
    def behind_prompts(cls, lengths: Sequence[int], prompted: int, *, multiple: int, device: torch.device) -> PackedRows:
        """Rows of so many tokens, each behind `prompted` columns of a soft prompt; all columns are a multiple of `multiple`."""
        columns = [prompted + length for length in lengths]
        if missing := -sum(columns) % multiple:
            columns.append(missing)
        starts = torch.tensor([0, *accumulate(columns)], dtype=torch.int32).to(device, non_blocking=True)
        position_ids = torch.cat([torch.arange(size) for size in columns]).to(device, non_blocking=True)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=max(columns),
            max_seqlen_kv=max(columns),
            lengths=tuple(columns),
            position_ids=position_ids,
            prompted=prompted,
            rows=len(lengths),
        )

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(columns of each, how many) of neighbours that are as long as each other."""
        return [(size, len(list(same))) for size, same in groupby(self.lengths)]

    def with_prompts(self, soft_prompt_PH: Tensor, words_SH: Tensor) -> Tensor:
        """[R P + S, H]: the soft prompt in front of each row. Its gradient is summed over rows in its own dtype."""
        sizes = [size - self.prompted for size in self.lengths[: self.rows]]
        prompts = soft_prompt_PH.expand(self.rows, -1, -1).to(words_SH.dtype)
        return torch.cat([part for pair in zip(prompts, words_SH.split(sizes)) for part in pair])

    def without_prompts(self, hidden_SBH: Tensor) -> Tensor:
        """The columns of the rows' own tokens."""
        if not self.prompted:
            return hidden_SBH[: sum(self.lengths[: self.rows])]
        return torch.cat([row[self.prompted :] for row in hidden_SBH.split(self.lengths)[: self.rows]])
