"""Vocabulary-parallel distillation losses, from logits or straight from hidden states. Knows torch and Triton only."""

from .reference import (
    OBJECTIVES,
    cross_entropy,
    fused_linear_cross_entropy,
    fused_linear_kl,
    fused_linear_promptkd_loss,
    kl_div,
    prompt_embedding,
    promptkd_loss,
)

__all__ = [
    "OBJECTIVES",
    "cross_entropy",
    "fused_linear_cross_entropy",
    "fused_linear_kl",
    "fused_linear_promptkd_loss",
    "kl_div",
    "prompt_embedding",
    "promptkd_loss",
]
