"""megatron-core's parallel linear layers; without gradients, the same product without the autograd functions around it.

Those cost more than the product itself in a small model that decodes a few rows. Under sequence parallelism they are what gathers
and scatters the sequence, so they stay. Adapters (`lora`) are called here, in training as in decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


class Adapted:
    """A linear layer to whose product its adapters add theirs, where it has any."""

    cut: ClassVar[dict[str, int]]  # its own parameters that tensor parallelism cuts, and along which axis
    multiply: Callable[[Tensor, bool], Tensor] | None = None  # the product without gradients, of codes (eight_bit.py)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.adapters: nn.ModuleDict | None = None  # and no empty one: a small model decodes slower by it

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        output, bias = self.product(input_, *args, **kwargs)
        if self.adapters is not None:
            for adapter in self.adapters.values():
                output = adapter(input_, output, self.sequence_parallel)
        return output, bias

    @property
    def multiplies_codes(self) -> bool:
        """Where no gradient passes, and not in training: of a recomputed layer's two passes the first has none, and both are to be one."""
        return self.multiply is not None and not self.training

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """megatron's, which knows its own two parameters."""
        axes = dict(self.cut)
        for name, adapter in (self.adapters or {}).items():
            axes |= {f"adapters.{name}.{parameter}": axis for parameter, axis in adapter.cut.items()}
        state, groups = self.state_dict(prefix="", keep_vars=True), {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)


class ColumnLinear(Adapted, ColumnParallelLinear):
    """x Wᵀ (+ b), where this rank holds rows of W and b; returns it and the bias that the caller adds, if it does."""

    cut: ClassVar = {"weight": 0, "bias": 0}

    def product(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Without adapters."""
        is_coded = self.multiplies_codes
        if torch.is_grad_enabled() or (self.sequence_parallel and not is_coded) or args or kwargs:
            return ColumnParallelLinear.forward(self, input_, *args, **kwargs)
        output = self.multiply(input_, self.sequence_parallel) if is_coded else F.linear(input_, self.weight)
        bias = self.bias
        if self.skip_bias_add or bias is None:
            return output, bias
        return output + bias, None


class RowLinear(Adapted, RowParallelLinear):
    """x Wᵀ summed over ranks, where this rank holds columns of W; returns it and the bias that the caller adds."""

    cut: ClassVar = {"weight": 1}

    def product(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Without adapters."""
        is_coded = self.multiplies_codes
        if torch.is_grad_enabled() or (self.sequence_parallel and not is_coded) or not self.skip_bias_add:
            return RowParallelLinear.forward(self, input_)
        if is_coded:
            return self.multiply(input_, self.sequence_parallel), self.bias
        output = F.linear(input_, self.weight)
        if self.tp_group.size() > 1:
            dist.all_reduce(output, group=self.tp_group)
        return output, self.bias

    def _forward_impl(self, *args, **options):
        """Without a group, which the product does not use, megatron asks global state for one."""
        return super()._forward_impl(*args, **options | {"tp_group": self.tp_group})
