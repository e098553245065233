"""Rotary positions as transformers has them: inverse frequencies and attention scaling of each kind of layer, from its own code.

    channel i of a query or key at position p turns by p · f_i, and is scaled by a        f: inverse frequencies, a: attention scaling
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

KINDS = ("full_attention", "sliding_attention")  # keys of rope_parameters where layers differ


@dataclass(frozen=True)
class Rope:
    """Of one kind of layer; frequencies [d / 2] in float32."""

    frequencies: Tensor
    scaling: float = 1.0

    def table(self, positions: int, dtype: torch.dtype) -> Tensor:
        """What `rotate` multiplies channels by at every position, [2, positions, 1, d]: cos, and sin with the sign of its channel."""
        steps = torch.arange(positions, device=self.frequencies.device, dtype=torch.float32)
        angle = torch.outer(steps, self.frequencies)
        cos, sin = angle.cos() * self.scaling, angle.sin() * self.scaling
        return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).to(dtype)[:, :, None]


def ropes_of(hf: PretrainedConfig) -> list[Rope]:
    """That of all layers; or that of layers that attend to everything, and that of those that slide."""
    kinds = [kind for kind in KINDS if kind in hf.rope_parameters and kind in hf.layer_types]
    rotary, starts = (Gemma3RotaryEmbedding(hf), [f"{kind}_" for kind in kinds]) if kinds else (LlamaRotaryEmbedding(hf), [""])
    device = torch.cuda.current_device()
    frequencies = [getattr(rotary, f"{start}inv_freq").detach().clone().float().to(device) for start in starts]
    return [Rope(f, getattr(rotary, f"{start}attention_scaling")) for f, start in zip(frequencies, starts)]


def rope_parameters(hf: PretrainedConfig) -> list[dict]:
    """What config.json says of each kind of layer, of those that attend to everything first."""
    return [hf.rope_parameters[kind] for kind in KINDS if kind in hf.rope_parameters] or [hf.rope_parameters]


def stretched_context(hf: PretrainedConfig) -> int:
    """Positions that a model can be given: max_position_embeddings, but where yarn stretches a shorter context beyond it.

    dynamic stretches further still, by frequencies that change with the length of the row; what a cache holds was turned by those of
    a shorter one, so that is where it ends.
    """
    scaling = rope_parameters(hf)[0]
    if scaling.get("rope_type") != "yarn" or not scaling.get("factor"):
        return hf.max_position_embeddings
    return max(hf.max_position_embeddings, int(scaling["factor"] * scaling["original_max_position_embeddings"]))


def rotate(query_sbnd: Tensor, key_sbgd: Tensor, rotary_2sb1d: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding; channel i turns with channel i + d/2. Of the table, b may be 1: the same positions in every row."""
    x = torch.cat([query_sbnd, key_sbgd], 2)
    cos, sin = rotary_2sb1d.unbind()
    x = x * cos + x.roll(x.shape[-1] // 2, -1) * sin
    n = query_sbnd.shape[2]
    return x[:, :, :n], x[:, :, n:]
