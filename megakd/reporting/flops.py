"""Floating-point operations of a decoder-only transformer, for model FLOPs utilisation (MFU).

A matrix product of n weights costs 2 n per token. Per token and layer, with h hidden, d head width, a heads, g key-value heads,
f feed-forward width and s positions in the row:

    query and output projections   4 h a d            key and value projections       4 h g d
    attention, causal              2 s a d            feed-forward                    4 h f, gated 6 h f

and the head 2 h V. Attention: scores and weighted sum are 2 a d per position looked at each, and a token looks at s / 2 of them
on average. Norms, activations, softmax and embedding look-ups are left out, as is usual. The backward pass costs twice the
forward pass: gradients of inputs and of weights. A frozen model that passes a gradient on needs only the first of the two.
"""

from dataclasses import dataclass

FORWARD = 1  # passes: multiply forward_flops_per_token
FROZEN_WITH_GRADIENT = 2  # the prompted teacher: its weights have no gradient, its input has
TRAINING = 3

PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # NVIDIA data sheets, SXM, dense, per second


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """The letters above, by the names of megatron-core's TransformerConfig where it has one."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int  # key-value heads
    head_dim: int
    vocab_size: int
    gated: bool = False  # Llama's SwiGLU: three matrices, not two


def forward_flops_per_token(sizes: TransformerSizes, seq_length: float, *, with_head: bool = True) -> float:
    """FLOPs of one forward pass, per token of rows of `seq_length` tokens. Without the head: hidden states only."""
    attention_width = sizes.num_attention_heads * sizes.head_dim
    projections = 4 * sizes.hidden_size * (attention_width + sizes.num_query_groups * sizes.head_dim)
    attention = 2 * seq_length * attention_width
    feed_forward = (6 if sizes.gated else 4) * sizes.hidden_size * sizes.ffn_hidden_size
    head = 2 * sizes.hidden_size * sizes.vocab_size if with_head else 0
    return sizes.num_layers * (projections + attention + feed_forward) + head


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs a second of the GPU torch calls `device_name`; None where it is not in the table."""
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name), None)
