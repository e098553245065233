"""One pipeline stage of a model, decoding a group of rows on a static cache.

The model's own forward pass computes; what is said here is where columns stand. A soft prompt has the first P columns; the R = L - P
behind it are a ring, on which every row's prompt ends in the same column and every step writes the next one:

    columns    0 .. P-1 soft prompt | ... padding, prompt | response of step 0, 1, ... (mod R)
    positions  0 .. P-1             |         P .. P+n-1  | P+n ..                            n = length of the row's prompt

A row that joins later, at step J, has its prompt end in column J - 1 of the responses: it may write over columns of rows that are gone.
No row is longer than the ring. So a column's position in a row follows from where the row starts on the ring, and a column sees those
of a position up to its own: what others left there, and padding, have positions that the row has not come to.

All that changes from step to step, and from group to group, is in tensors that stay where they are; with `filled` fixed a step can be
captured as a CUDA graph, and replayed for other groups of as many rows; but for a sparse model's (`has_fixed_steps`).

Prompts are read in slices of rows of like length, each as wide as its longest row: padding lies in the cache, hardly computed. Of rows
with one prompt the first reads it, and the others have a copy of its columns.

B rows, U prompts that are read, S columns of this step (1 when decoding), L columns in all, H hidden, P soft prompt,
g key/value heads on this rank, d head size, Vp vocabulary columns on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd.models.decoding import check_layers
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.kv_cache import CacheStep, KVCache
from megakd.models.sparse_mlp import SparseMLP

FEW_ROWS, FEW_NARROW_ROWS = range(4, 17), range(1, 17)  # of float32, and of bfloat16
ALIGNED = 8  # columns: a GPU's attention copies a mask of other widths at every layer and step


def has_fixed_steps(model: HiddenStateGPTModel) -> bool:
    """Whether a step's shapes depend on the number of rows alone: not where each expert of a layer reads the tokens that chose it."""
    return not any(isinstance(layer.mlp, SparseMLP) for layer in model.decoder.layers)


class Decoder:
    """The stage with the cache of its rows, for one group after the other."""

    def __init__(self, model: HiddenStateGPTModel, rows: int, columns: int, *, soft_length: int = 0):
        check_layers(model)
        self.model, self.soft_length = model, soft_length
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.cache = KVCache([layer.self_attention for layer in model.decoder.layers], rows, columns, self.dtype, self.device)
        self.columns_L = torch.arange(columns, device=self.device)
        self.rotary = model.rotary_tables(columns)
        self.windows = {layer.self_attention.core_attention.window for layer in model.decoder.layers}
        self.ring = columns - soft_length
        self.last_position = min(columns, model.max_sequence_length) - 1
        self.offset_B = torch.zeros(rows, dtype=torch.int64, device=self.device)  # P + n - J: what a step is behind its position
        self.position_BL = torch.zeros(rows, columns, dtype=torch.int64, device=self.device)
        self.prompts_end = torch.zeros((), dtype=torch.int64, device=self.device)  # on the ring, of the rows that were there at first

    def begin(self, width: int, soft_prompt_PH: Tensor | None = None) -> None:
        """A group, whose first prompts are of `width` at most."""
        self.soft_prompt_PH, self.width = soft_prompt_PH, width
        self.prompts_end.fill_(width)

    def expect(self, prompts: Sequence[Sequence[int]]) -> None:
        """What the next prefill reads: longest first or nearly so, each of which fits with what will be behind it."""
        self.prompts, self.slices = prompts, slices_of_like_length([len(prompt) for prompt in prompts])

    def prefill_buffers(self) -> list[Tensor]:
        """Room for what the stage before sends of the prompts that are expected."""
        return [self._buffer(self.soft_length + part.width, len(part.rows)) for part in self.slices]

    def step_buffer(self, rows: int) -> Tensor:
        """The same of one column of so many rows."""
        return self._buffer(1, rows)

    def _buffer(self, columns: int, rows: int) -> Tensor:
        return torch.empty(columns, rows, self.model.config.hidden_size, dtype=self.dtype, device=self.device)

    def filled(self, columns: int) -> int:
        """Columns that hold something, when so many of the ring have been written."""
        return self.soft_length + min(columns, self.ring)

    def keep(self, order_B: Tensor, sources: Tensor, targets: Tensor, written: int) -> None:
        """Let rows leave: row i of the new group was row order_B[i]."""
        self.cache.move(sources, targets, self.filled(written))
        for of_rows in (self.offset_B, self.position_BL):
            of_rows[: len(order_B)] = of_rows[order_B]

    def prefill(self, hidden: list[Tensor], *, first: int = 0, joined: int = 0, prompt_of: Sequence[int] = ()) -> list[Tensor]:
        """The prompts, on later stages their hidden states: to hidden states by slice, or on the last stage logits [U, Vp].

        Rows from `first` on join at step `joined`; `prompt_of` says which of the prompts each has, by default one after the other.
        """
        lengths_U = torch.tensor([len(prompt) for prompt in self.prompts]).to(self.device, non_blocking=True)
        tokens_UW, end = left_padded(self.prompts, self.device), self.width + joined
        parts = zip(self.slices, *([hidden] if hidden else []))
        states = [self._prefill_slice(part, tokens_UW, lengths_U, end, first, *x) for part, *x in parts]
        if len(prompt_of) > len(lengths_U):
            of_B = torch.tensor(prompt_of).to(self.device, non_blocking=True)
            self.cache.copy(first + of_B, first, self.filled(end))
            lengths_U = lengths_U[of_B]
        seats = slice(first, first + len(lengths_U))
        self.offset_B[seats] = self.soft_length + lengths_U - joined
        self.position_BL[seats] = self.positions(end - lengths_U)
        return [torch.cat(states)] if self.model.post_process else states

    def _prefill_slice(
        self, part: Slice, tokens_UW: Tensor, lengths_U: Tensor, end: int, first: int, hidden: Tensor | None = None
    ) -> Tensor:
        mine, seats = slice(part.rows.start, part.rows.stop), slice(first + part.rows.start, first + part.rows.stop)
        soft_columns, columns = self.columns_L[: self.soft_length], self.columns_L[: part.width] - part.width  # before the prompts' end
        columns_S = torch.cat([soft_columns, self.soft_length + (end + columns) % self.ring])
        positions = (columns + lengths_U[mine, None]).clamp(min=0)
        positions_BS = torch.cat([soft_columns.expand(len(part.rows), -1), self.soft_length + positions], 1)
        filled = self.filled(end)
        filled = filled if self.device.type == "cpu" else min(aligned(filled), len(self.columns_L))  # what is behind the prompts is masked
        masks = self.masks(self.positions(end - lengths_U[mine])[:, :filled], positions_BS)
        step = CacheStep(self.cache, seats, columns_S, filled, masks)
        return self.run(tokens_UW[mine, tokens_UW.shape[1] - part.width :], positions_BS, step, hidden, self.soft_prompt_PH)

    def positions(self, starts_B: Tensor) -> Tensor:
        """[B, L], of every column in rows that start there on the ring; soft prompts in front are the same of all."""
        on_ring = (self.columns_L - self.soft_length - starts_B[:, None]) % self.ring
        return torch.where(self.columns_L < self.soft_length, self.columns_L, self.soft_length + on_ring)

    def decode(self, tokens_B: Tensor, step: Tensor, written: int | None, hidden: Tensor | None = None) -> Tensor:
        """The tokens that a step reads, from 0 on, on later stages their hidden states: to a hidden state of each row, or logits.

        `written` columns of the ring are attended to; None: all there are, whatever the step.
        """
        columns_S = self.soft_length + (self.prompts_end + step[None]) % self.ring
        positions_BS = (self.offset_B[: len(tokens_B)] + step)[:, None]
        positions_BS = positions_BS.clamp(max=self.last_position)  # a row that has ended may not have left yet
        rows, filled = slice(0, len(tokens_B)), len(self.columns_L) if written is None else self.filled(written)
        tokens_BS = tokens_B[:, None].clamp(min=0)  # NO_TOKEN until it is looked at
        masks = self.masks(self.position_BL[rows, :filled], positions_BS)
        return self.run(tokens_BS, positions_BS, CacheStep(self.cache, rows, columns_S, filled, masks), hidden)

    def run(
        self, tokens_BS: Tensor, positions_BS: Tensor, step: CacheStep, hidden_SBH: Tensor | None, soft_prompt_PH: Tensor | None = None
    ) -> Tensor:
        """This stage, and on the last stage the head at the last column; positions and columns are those of a soft prompt too."""
        self.model.set_input_tensor(hidden_SBH)
        rotary = None if self.rotary is None else self.rotary[:, :, positions_BS.t()]
        hidden_SBH = self.model(tokens_BS, positions_BS, soft_prompt_PH, rotary=rotary, step=step)
        return self.head(hidden_SBH[-1]) if self.model.post_process else hidden_SBH

    def head(self, x_BH: Tensor) -> Tensor:
        """Logits [B, Vp]. Few rows go second in the product, which a CPU does faster or not by their number and width
        (docs/benchmarks.md); one to three of float32 take twice as long so, and go first."""
        weight = self.model.output_weight()
        few = FEW_ROWS if weight.dtype == torch.float32 else FEW_NARROW_ROWS
        return (weight @ x_BH.t()).t().contiguous() if len(x_BH) in few else F.linear(x_BH, weight)

    def masks(self, position_BL: Tensor, positions_BS: Tensor) -> dict[int | None, Tensor]:
        """[B, 1, S, filled] for each window, added to the scores: a column sees positions up to its own, as far back as the window. No
        row of it is empty, whose softmax would be NaN: padding stands at position P."""
        columns, own = position_BL[:, None], positions_BS[:, :, None]
        before = columns <= own
        of = lambda window: before if window is None else before & (own - columns < window)
        return {window: self._added(of(window)) for window in self.windows}

    def _added(self, visible: Tensor) -> Tensor:
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, float("-inf"))
        return mask[:, None]


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device, *, width: int = 0, padding: int = 0) -> Tensor:
    """[B, W], W the longest of them, or `width`; the device is not waited for."""
    width = max(width, *map(len, prompts))
    return torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]).to(device, non_blocking=True)


def aligned(columns: int, multiple: int = ALIGNED) -> int:
    """The next multiple."""
    return -(-columns // multiple) * multiple


@dataclass(frozen=True)
class Slice:
    """Rows whose prompts are read together, `width` columns wide."""

    rows: range
    width: int


def slices_of_like_length(lengths: Sequence[int]) -> list[Slice]:
    """Cut rows, longest first or nearly so, where a row is shorter than three quarters of its slice's first."""
    starts = [0]
    for i, length in enumerate(lengths):
        if length < 0.75 * lengths[starts[-1]]:
            starts.append(i)
    return [Slice(range(lo, hi), max(lengths[lo:hi])) for lo, hi in pairwise([*starts, len(lengths)])]
