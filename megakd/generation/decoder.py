"""One pipeline stage of a model, decoding a group of rows on a static cache.

The model's own forward pass computes; what is said here is where columns stand. Rows are left-padded to one width, a soft prompt
stands before the padding:

    columns    0 .. P-1 soft prompt | P .. P+W-1 padding, then prompt | P+W .. response
    positions  0 .. P-1             |                  P .. P+n-1     | P+n .. response            n = length of the row's prompt

All that changes from step to step, and from group to group, is in tensors that stay where they are; with `filled` fixed a step can be
captured as a CUDA graph, and replayed for other groups of as many rows; but for a sparse model's (`has_fixed_steps`).

Prompts are read in slices of rows of like length, each as wide as its longest row: padding lies in the cache, hardly computed.

B rows, S columns of this step (1 when decoding), L columns in all, H hidden, P soft prompt, W widest prompt,
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

FEW_ROWS = 8
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
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.is_token_BL = torch.zeros(rows, columns, dtype=torch.bool, device=self.device)
        self.prompts_end = torch.zeros((), dtype=torch.int64, device=self.device)  # P + W

    def begin(self, prompts: Sequence[Sequence[int]], soft_prompt_PH: Tensor | None = None) -> None:
        """A group of as many prompts as there are rows, longest first or nearly so, that fit with what will be behind them."""
        lengths = [len(prompt) for prompt in prompts]
        self.soft_prompt_PH, self.width, self.slices = soft_prompt_PH, max(lengths), slices_of_like_length(lengths)
        end = self.soft_length + self.width
        self.prompt_columns = end if self.device.type == "cpu" else aligned(end)  # what is behind the prompts is masked
        self.prompts_end.fill_(end)
        self.lengths_B.copy_(torch.tensor(lengths), non_blocking=True)
        column = self.columns_L - self.soft_length
        self.is_token_BL.copy_((column < 0) | (column >= (self.width - self.lengths_B)[:, None]))  # everything but the padding

    def buffers(self, rows: int, *, prefill: bool) -> list[Tensor]:
        """Room for what the stage before sends."""
        shapes = [(self.soft_length + s.width, len(s.rows)) for s in self.slices] if prefill else [(1, rows)]
        return [torch.empty(*shape, self.model.config.hidden_size, dtype=self.dtype, device=self.device) for shape in shapes]

    def keep(self, order_B: Tensor, sources: Tensor, targets: Tensor, filled: int) -> None:
        """Let rows leave: row i of the new group was row order_B[i]."""
        self.cache.move(sources, targets, self.soft_length + filled)
        for of_rows in (self.lengths_B, self.is_token_BL):
            of_rows[: len(order_B)] = of_rows[order_B]

    def prefill(self, tokens_BW: Tensor, hidden: list[Tensor]) -> list[Tensor]:
        """The left-padded prompts, on later stages their hidden states: to hidden states by slice, or logits [B, Vp]."""
        states = [self._prefill_slice(part, tokens_BW, *x) for part, *x in zip(self.slices, *([hidden] if hidden else []))]
        return [torch.cat(states)] if self.model.post_process else states

    def _prefill_slice(self, part: Slice, tokens_BW: Tensor, hidden: Tensor | None = None) -> Tensor:
        rows, soft_columns = slice(part.rows.start, part.rows.stop), self.columns_L[: self.soft_length]
        columns = self.columns_L[self.width - part.width : self.width]  # of the prompt
        positions = (columns - (self.width - self.lengths_B[rows, None])).clamp(min=0)
        positions_BS = torch.cat([soft_columns.expand(len(part.rows), -1), self.soft_length + positions], 1)
        columns_S = torch.cat([soft_columns, self.soft_length + columns])
        tokens_BS = tokens_BW[rows, self.width - part.width :]
        return self.run(tokens_BS, positions_BS, columns_S, rows, self.prompt_columns, hidden, self.soft_prompt_PH)

    def decode(self, tokens_B: Tensor, step: Tensor, filled: int | None, hidden: Tensor | None = None) -> Tensor:
        """The `step`-th response token (from 0) of each row, on later stages its hidden state: to a hidden state, or logits.

        `filled` columns of prompt and response are attended to; None: all there are, whatever the step.
        """
        columns_S = self.prompts_end + step[None]
        positions_BS = (self.soft_length + self.lengths_B[: len(tokens_B)] + step)[:, None]
        positions_BS = positions_BS.clamp(max=self.model.max_sequence_length - 1)  # a row that has ended may not have left yet
        rows, filled = slice(0, len(tokens_B)), len(self.columns_L) if filled is None else self.soft_length + filled
        tokens_BS = tokens_B[:, None].clamp(min=0)  # NO_TOKEN until it is looked at
        return self.run(tokens_BS, positions_BS, columns_S, rows, filled, hidden)

    def run(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        columns_S: Tensor,
        rows: slice,
        filled: int,
        hidden_SBH: Tensor | None,
        soft_prompt_PH: Tensor | None = None,
    ) -> Tensor:
        """This stage, and on the last stage the head at the last column; positions and columns are those of a soft prompt too."""
        self.model.set_input_tensor(hidden_SBH)
        hidden_SBH = self.model(
            tokens_BS,
            positions_BS,
            soft_prompt_PH,
            rotary=None if self.rotary is None else self.rotary[:, :, positions_BS.t()],
            step=CacheStep(self.cache, rows, columns_S, filled, self.masks(columns_S, rows, filled)),
        )
        return self.head(hidden_SBH[-1]) if self.model.post_process else hidden_SBH

    def head(self, x_BH: Tensor) -> Tensor:
        """Logits [B, Vp]. Few rows go second in the product: on a CPU that is up to four times faster."""
        weight = self.model.output_weight()
        return (weight @ x_BH.t()).t().contiguous() if len(x_BH) <= FEW_ROWS else F.linear(x_BH, weight)

    def masks(self, columns_S: Tensor, rows: slice, filled: int) -> dict[int | None, Tensor]:
        """[B, 1, S, filled] for each window, added to the scores: a column sees the tokens up to itself, as far back as the window."""
        columns_L = self.columns_L[:filled]
        before, itself = columns_L <= columns_S[:, None], columns_L == columns_S[:, None]
        visible = before & self.is_token_BL[rows, None, :filled] | itself  # padding too sees itself: an empty softmax is NaN
        of = lambda window: visible if window is None else visible & self.within(window, columns_S, rows, filled)
        return {window: self._added(of(window)) for window in self.windows}

    def within(self, window: int, columns_S: Tensor, rows: slice, filled: int) -> Tensor:
        """[B, S, filled]: fewer than `window` positions back. Padding stands between a soft prompt and the prompt, and is none."""
        padding_B1 = self.prompts_end - self.soft_length - self.lengths_B[rows, None]
        position = lambda columns: torch.where(columns < self.soft_length, columns, columns - padding_B1)
        return position(columns_S)[:, :, None] - position(self.columns_L[:filled])[:, None] < window

    def _added(self, visible: Tensor) -> Tensor:
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, float("-inf"))
        return mask[:, None]


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
