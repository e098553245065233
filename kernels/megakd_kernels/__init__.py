"""Vocabulary-parallel distillation losses, from logits or straight from hidden states. Knows torch and Triton only."""

from .cross_entropy import cross_entropy
from .fused_linear_kl import fused_linear_cross_entropy, fused_linear_kl, fused_linear_promptkd_loss
from .kl_div import kl_div
from .prompt_embedding import prompt_embedding
from .promptkd_loss import promptkd_loss
from .reference import OBJECTIVES

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
