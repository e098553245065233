"""Vocabulary-parallel distillation losses, from logits or straight from hidden states. Knows torch and Triton only."""

from .cross_entropy.loss import cross_entropy
from .divergence import OBJECTIVES
from .divergence.kl_div import kl_div
from .heads.fused_linear import (
    fused_linear_cross_entropy,
    fused_linear_kd_loss,
    fused_linear_kl,
    fused_linear_promptkd_loss,
    fused_linear_topk_kd_loss,
    fused_linear_topk_kl,
    fused_linear_topk_kl_with_bias,
)
from .kl.promptkd_loss import promptkd_loss
from .prompt_embedding.operator import prompt_embedding
from .shards import VocabShard
from .topk import TopKRows

__all__ = [
    "OBJECTIVES",
    "TopKRows",
    "VocabShard",
    "cross_entropy",
    "fused_linear_cross_entropy",
    "fused_linear_kd_loss",
    "fused_linear_kl",
    "fused_linear_promptkd_loss",
    "fused_linear_topk_kd_loss",
    "fused_linear_topk_kl",
    "fused_linear_topk_kl_with_bias",
    "kl_div",
    "prompt_embedding",
    "promptkd_loss",
]
