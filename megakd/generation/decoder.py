"""One pipeline stage of a model, decoding a group of rows on a static cache.

The layers' own weights are read, without their modules: nothing of training is met here (sequence parallelism, dropout,
recomputation), so there is nothing to switch off and nothing to restore. Rows are left-padded to one width, a soft prompt stands
before the padding:

    columns    0 .. P-1 soft prompt | P .. P+W-1 padding, then prompt | P+W .. response
    positions  0 .. P-1             |                  P .. P+n-1     | P+n .. response            n = length of the row's prompt

All that changes from step to step is in tensors, and with `filled` fixed a step can be captured as a CUDA graph.

Prompts are read in slices of rows of like length, each as wide as its longest row: padding lies in the cache, hardly computed.

B rows, S columns of this step (1 when decoding), L columns in all, H hidden, P soft prompt, W widest prompt,
g key/value heads and r query heads to each of them on this rank, d head size, Vp vocabulary columns on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megakd.generation.kv_cache import KVCache
from megakd.generation.sampling import all_gather
from megakd.models.gpt_model import HiddenStateGPTModel

FEW_ROWS = 8


class Decoder:
    """The stage with the cache of its rows: `prompts` come longest first, and there is room for `max_new_tokens` behind each."""

    def __init__(
        self,
        model: HiddenStateGPTModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        soft_prompt_PH: Tensor | None = None,
    ):
        self.model, self.layers, self.tp_group = model, model.decoder.layers, model.layout.tp_group
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.soft_prompt_PH = soft_prompt_PH
        self.soft_length = 0 if soft_prompt_PH is None else soft_prompt_PH.shape[0]
        self.lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self.width = len(prompts[0])
        self.slices = slices_of_like_length([len(prompt) for prompt in prompts])
        columns = self.soft_length + self.width + max_new_tokens
        self.heads = Heads(model)
        shape = (len(self.layers), len(prompts), self.heads.groups, columns, self.heads.size)
        self.cache = KVCache(shape, dtype=self.dtype, device=self.device)
        self.columns_L = torch.arange(columns, device=self.device)
        self.is_token_BL = self._is_token()
        self.rotary = rotary_tables(model, columns, self.dtype)

    def _is_token(self) -> Tensor:
        """[B, L]: everything but the padding."""
        padding = (self.width - self.lengths_B)[:, None]
        column = self.columns_L - self.soft_length
        return (column < 0) | (column >= padding)

    def buffers(self, rows: int, *, prefill: bool) -> list[Tensor]:
        """Room for what the stage before sends."""
        shapes = [(len(s.rows), self.soft_length + s.width) for s in self.slices] if prefill else [(rows, 1)]
        return [torch.empty(*shape, self.model.config.hidden_size, dtype=self.dtype, device=self.device) for shape in shapes]

    def keep(self, order: list[int], sources: list[int], targets: list[int], filled: int) -> None:
        """Let rows leave: row i of the new group was row order[i]."""
        self.cache.move(sources, targets, self.soft_length + filled)
        self.lengths_B, self.is_token_BL = self.lengths_B[order], self.is_token_BL[order]

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
        if hidden is None:
            hidden = self.embed(tokens_BW[rows, self.width - part.width :], positions_BS, self.soft_prompt_PH)
        return self.run(hidden, positions_BS, columns_S, rows, self.soft_length + self.width)

    def decode(self, tokens_B: Tensor, step: Tensor, filled: int, hidden: Tensor | None = None) -> Tensor:
        """The `step`-th response token (from 0) of each row, on later stages its hidden state: to a hidden state, or logits."""
        columns_S = self.soft_length + self.width + step[None]
        positions_BS = (self.soft_length + self.lengths_B + step)[:, None]
        positions_BS = positions_BS.clamp(max=self.model.max_sequence_length - 1)  # a row that has ended may not have left yet
        if hidden is None:
            hidden = self.embed(tokens_B[:, None].clamp(min=0), positions_BS)  # NO_TOKEN until it is looked at
        return self.run(hidden, positions_BS, columns_S, slice(0, len(tokens_B)), self.soft_length + filled)

    def embed(self, tokens_BS: Tensor, positions_BS: Tensor, soft_prompt_PH: Tensor | None = None) -> Tensor:
        """[B, P + S, H], of a soft prompt if there is one; `positions_BS` counts its vectors too."""
        embedding = self.model.embedding
        x = embedding.word_embeddings(tokens_BS)
        if soft_prompt_PH is not None:
            x = torch.cat([soft_prompt_PH.to(x.dtype).expand(len(x), -1, -1), x], 1)
        return x + embedding.position_embeddings(positions_BS) if embedding.add_position_embedding else x

    def run(self, x_BSH: Tensor, positions_BS: Tensor, columns_S: Tensor, rows: slice, filled: int) -> Tensor:
        """This stage's layers, and on the last stage the head at the last column."""
        mask = self.mask(columns_S, rows, filled)
        rotary = None if self.rotary is None else self.rotary[:, positions_BS]
        for i, layer in enumerate(self.layers):
            x_BSH = x_BSH + self.attend(i, layer.self_attention, layer.input_layernorm(x_BSH), mask, rotary, columns_S, rows)
            x_BSH = x_BSH + self.feed_forward(layer.mlp, layer.pre_mlp_layernorm(x_BSH))
        if not self.model.post_process:
            return x_BSH
        return self.head(self.model.decoder.final_layernorm(x_BSH[:, -1]))

    def head(self, x_BH: Tensor) -> Tensor:
        """Logits [B, Vp]. Few rows go second in the product: on a CPU that is up to four times faster."""
        weight = self.model.output_weight()
        return (weight @ x_BH.t()).t().contiguous() if len(x_BH) <= FEW_ROWS else F.linear(x_BH, weight)

    def mask(self, columns_S: Tensor, rows: slice, filled: int) -> Tensor:
        """[B, 1, r·S, filled], added to the scores: a column sees the tokens up to itself."""
        columns_L = self.columns_L[:filled]
        before, itself = columns_L <= columns_S[:, None], columns_L == columns_S[:, None]
        visible = before & self.is_token_BL[rows, None, :filled] | itself  # padding too sees itself: an empty softmax is NaN
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=self.device).masked_fill_(~visible, float("-inf"))
        return mask.repeat(1, self.heads.per_group, 1)[:, None]

    def attend(self, i: int, attention, x_BSH: Tensor, mask: Tensor, rotary: Tensor | None, columns_S: Tensor, rows: slice):
        """Causal attention over the cache. The r query heads of a group are r more queries: one kernel serves MHA and GQA."""
        b, s, _ = x_BSH.shape
        g, r, d = self.heads.groups, self.heads.per_group, self.heads.size
        qkv = self.heads.project(attention.linear_qkv, x_BSH)  # [B, S, g, r + 2, d]
        if rotary is not None:
            qkv = torch.cat([rotate(qkv[..., :-1, :], rotary), qkv[..., -1:, :]], -2)
        query = qkv[..., :r, :].permute(0, 2, 3, 1, 4).reshape(b, g, r * s, d)
        key, value = (qkv[..., part, :].transpose(1, 2) for part in (r, r + 1))
        keys, values = self.cache.store(i, rows, columns_S, key, value, mask.shape[-1])
        out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=attention.core_attention.softmax_scale)
        out = out.view(b, g, r, s, d).permute(0, 3, 1, 2, 4).reshape(b, s, g * r * d)
        return row_parallel(attention.linear_proj, out, self.tp_group)

    def feed_forward(self, mlp, x_BSH: Tensor) -> Tensor:
        """[B, S, H], whole on every tensor-parallel rank."""
        config = self.model.config
        x = F.linear(x_BSH, mlp.linear_fc1.weight, mlp.linear_fc1.bias)
        if config.gated_linear_unit:
            gate, up = x.chunk(2, -1)
            x = config.activation_func(gate) * up
        else:
            x = config.activation_func(x)
        return row_parallel(mlp.linear_fc2, x, self.tp_group)


@dataclass(frozen=True)
class Slice:
    """Rows whose prompts are read together, `width` columns wide."""

    rows: range
    width: int


def slices_of_like_length(lengths: Sequence[int]) -> list[Slice]:
    """Cut rows, longest first, where a row is shorter than three quarters of its slice's first."""
    starts = [0]
    for i, length in enumerate(lengths):
        if length < 0.75 * lengths[starts[-1]]:
            starts.append(i)
    return [Slice(range(lo, hi), lengths[lo]) for lo, hi in pairwise([*starts, len(lengths)])]


class Heads:
    """Which heads this rank computes: `groups` key/value heads with `per_group` query heads each, of `size`."""

    def __init__(self, model: HiddenStateGPTModel):
        config, self.tp_group = model.config, model.layout.tp_group
        tp = self.tp_group.size()
        self.size = config.kv_channels
        self.sharers = max(1, tp // config.num_query_groups)  # ranks that share one key/value head
        self.groups = max(1, config.num_query_groups // tp)
        self.per_group = config.num_attention_heads // tp // self.groups

    def project(self, linear_qkv, x_BSH: Tensor) -> Tensor:
        """[B, S, g, r + 2, d]: the query heads of each group, then its key, then its value."""
        qkv = F.linear(x_BSH, linear_qkv.weight, linear_qkv.bias)
        if self.sharers == 1:
            return qkv.view(*qkv.shape[:2], self.groups, self.per_group + 2, self.size)
        return self._own_part_of_shared_group(qkv)

    def _own_part_of_shared_group(self, qkv: Tensor) -> Tensor:
        """With fewer key/value heads than ranks, a rank's rows end inside a group: its ranks put it together again."""
        group, member = divmod(self.tp_group.rank(), self.sharers)
        parts = all_gather(qkv, self.tp_group)[group * self.sharers : (group + 1) * self.sharers]
        whole = torch.cat(list(parts), -1).unflatten(-1, (-1, self.size))  # [B, S, sharers · r + 2, d]
        query = whole[..., member * self.per_group : (member + 1) * self.per_group, :]
        return torch.cat([query, whole[..., -2:, :]], -2)[:, :, None]


def row_parallel(linear, x: Tensor, tp_group: ProcessGroup) -> Tensor:
    """x Wᵀ + b, where this rank holds columns of W and all of b."""
    if tp_group.size() == 1:
        return F.linear(x, linear.weight, linear.bias)
    y = F.linear(x, linear.weight)
    dist.all_reduce(y, group=tp_group)
    return y if linear.bias is None else y + linear.bias


def rotary_tables(model: HiddenStateGPTModel, columns: int, dtype: torch.dtype) -> Tensor | None:
    """cos and sin of every position and channel, [2, L, d]; None for a model with learned positions."""
    if model.position_embedding_type != "rope":
        return None
    frequencies = model.rotary_pos_emb.inv_freq
    angle = torch.arange(columns, device=frequencies.device, dtype=torch.float32)[:, None] * frequencies
    angle = torch.cat([angle, angle], -1)
    return torch.stack([angle.cos(), angle.sin()]).to(dtype)


def rotate(x_BSgnd: Tensor, rotary_2BSd: Tensor) -> Tensor:
    """Rotary position embedding; channel i turns with channel i + d/2."""
    cos, sin = rotary_2BSd[:, :, :, None, None]
    left, right = x_BSgnd.chunk(2, -1)
    return x_BSgnd * cos + torch.cat([-right, left], -1) * sin
