"""A Hugging Face folder read through a small window, whatever is asked of it."""

from __future__ import annotations

import torch
from torch import Tensor

from megakd.checkpointing.blocks import Index, row_pieces
from megakd.models.hf_checkpoint import DTYPES, HFCheckpoint


class WindowedCheckpoint(HFCheckpoint):
    """`read` copies a few rows at a time and unmaps them again, where HFCheckpoint hands out a view of the mapped file."""

    def read(self, name: str, index: Index) -> Tensor:
        shape, dtype = self.shape(name), DTYPES[self.dtype(name)]
        index = tuple(slice(*s.indices(size)[:2]) for s, size in zip(index, shape))
        out = torch.empty([s.stop - s.start for s in index], dtype=dtype)
        for piece in row_pieces(index, shape[-1] * dtype.itemsize):
            out[piece[0].start - index[0].start : piece[0].stop - index[0].start] = super().read(name, piece)
        return out
