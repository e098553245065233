"""Every operator in plain, differentiable torch under one name: what the others are tested against, in float64 too.

N rows (tokens), V columns of this rank, H hidden size, B batch, S sequence, P soft-prompt rows. Tensors are vocabulary shards
over `tp_group`; columns at or past `valid_vocab` have no probability in any model and get a gradient of zero. `weights` [N]
multiply the rows' losses; a row of weight 0 has loss and gradient 0 whatever it holds. Losses are float32 (float64 of float64).
"""

from .cross_entropy.reference import cross_entropy
from .divergence.reference import kl_div
from .heads.reference import fused_linear_cross_entropy, fused_linear_kd_loss, fused_linear_kl, fused_linear_promptkd_loss
from .kl.reference import promptkd_loss
from .prompt_embedding.reference import prompt_embedding
from .topk.reference import fused_linear_topk_kd_loss, fused_linear_topk_kl, fused_linear_topk_kl_with_bias

__all__ = [
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
