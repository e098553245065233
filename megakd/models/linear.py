"""megatron-core's parallel linear layers; without gradients, the same product without the autograd functions around it.

Those cost more than the product itself in a small model that decodes a few rows. Under sequence parallelism they are what gathers
and scatters the sequence, so they stay.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor


class ColumnLinear(ColumnParallelLinear):
    """x Wᵀ (+ b), where this rank holds rows of W and b; returns it and the bias that the caller adds, if it does."""

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled() or self.sequence_parallel or args or kwargs:
            return super().forward(input_, *args, **kwargs)
        output, bias = F.linear(input_, self.weight), self.bias
        if self.skip_bias_add or bias is None:
            return output, bias
        return output + bias, None


class RowLinear(RowParallelLinear):
    """x Wᵀ summed over ranks, where this rank holds columns of W; returns it and the bias that the caller adds."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled() or self.sequence_parallel or not self.skip_bias_add:
            return super().forward(input_)
        output = F.linear(input_, self.weight)
        if self.tp_group.size() > 1:
            dist.all_reduce(output, group=self.tp_group)
        return output, self.bias

    def _forward_impl(self, *args, **options):
        """Without a group, which the product does not use, megatron asks global state for one."""
        return super()._forward_impl(*args, **options | {"tp_group": self.tp_group})
