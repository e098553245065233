"""What megatron-core asks of Apex under `gradient_accumulation_fusion`, one function, by torch's own product where Apex is not there.

    W.main_grad += dYᵀ X

in float32, while dY and X are bfloat16: the gradient of a micro-batch is neither rounded to bfloat16 nor written and read once more.
"""

from __future__ import annotations

from types import SimpleNamespace

from megakd_kernels.heads.fused_linear import add_product
from torch import Tensor


def install() -> bool:
    """Give megatron-core's linear layers the function; False where they have found Apex's, which PyPI's `apex` has not."""
    from megatron.core.tensor_parallel import layers

    if layers._grad_accum_fusion_available:
        return getattr(layers, "fused_weight_gradient_mlp_cuda", None) is STAND_IN
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = STAND_IN, True
    return True


def add_weight_gradient(input_TI: Tensor, grad_output_TO: Tensor, main_grad_OI: Tensor) -> None:
    """Apex's wgrad_gemm_accum_fp32: T tokens, I inputs and O outputs of the layer on this rank."""
    add_product(main_grad_OI, grad_output_TO, input_TI)


STAND_IN = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
