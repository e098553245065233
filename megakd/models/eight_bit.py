"""Products of 8-bit codes, in a frozen model's layers where no gradient passes: rows x of the input become codes as they come.

    int8-dynamic   x ≈ s_x · code of int8,            x Wᵀ ≈ s_x s_w Σ codes · codes, an exact sum in int32
    fp8-dynamic    x ≈ s_x · code of float8 (e4m3),   the same, summed in float32

with a scale a row of x and a row of W, each the largest magnitude of the whole row over the largest code, whichever ranks hold its columns:
tensor parallelism changes the codes of neither. LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), section 2.1, without its outliers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

LARGEST = {"int8-dynamic": 127.0, "fp8-dynamic": 448.0}
TYPES = {"int8-dynamic": torch.int8, "fp8-dynamic": torch.float8_e4m3fn}
MULTIPLE = 16  # rows and columns of a weight that the libraries' products take
FEWEST_ROWS = 17  # that cuBLAS multiplies as int8
TINY = torch.finfo(torch.float32).tiny


class DynamicCodes(torch.nn.Module):
    """How one weight is stored: what torch calls a parametrization. `group`: the ranks that hold the other columns of its rows."""

    def __init__(self, kind: str, weight: Tensor, group: dist.ProcessGroup | None):
        super().__init__()
        self.kind, self.dtype, self.group = kind, weight.dtype, group

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and scales [rows, 1]."""
        return encode(weight, self.kind, self.group)

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weight."""
        return (codes.float() * scales).to(self.dtype)


@dataclass(frozen=True)
class EightBitProduct:
    """x Wᵀ of one layer, summed over ranks where W is cut along its columns; sequence parallelism as in megatron-core's layers."""

    kind: str
    codes: Tensor  # [out, in] of W
    scales: Tensor  # [out, 1], float32
    group: dist.ProcessGroup  # tensor-parallel ranks
    cuts_columns: bool

    @classmethod
    def of(cls, module: torch.nn.Module) -> EightBitProduct:
        """Of a layer whose weight is DynamicCodes."""
        stored = module.parametrizations.weight
        return cls(stored[0].kind, stored.original0, stored.original1, module.tp_group, isinstance(module, RowParallelLinear))

    def __call__(self, x: Tensor, sequence_parallel: bool) -> Tensor:
        if sequence_parallel and not self.cuts_columns:
            x = gather_from_sequence_parallel_region(x, group=self.group)
        codes, scales = encode(x.flatten(0, -2), self.kind, self.group if self.cuts_columns else None)
        out = multiply(codes, scales, self.codes, self.scales, x.dtype).unflatten(0, x.shape[:-1])
        if not self.cuts_columns or self.group.size() == 1:
            return out
        if sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(out, group=self.group)
        dist.all_reduce(out, group=self.group)
        return out


def fits(weight: Tensor) -> bool:
    """Whether products of its codes exist for its shape; a layer of another one multiplies its numbers."""
    return all(size % MULTIPLE == 0 for size in weight.shape)


def encode(rows: Tensor, kind: str, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Codes of [N, in], and scales [N, 1]. `group`: the ranks that hold the other columns."""
    largest = rows.abs().amax(1, keepdim=True).float()
    if group is not None and group.size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    scales = (largest / LARGEST[kind]).clamp(min=TINY)
    scaled = rows / scales
    return (scaled.round() if kind == "int8-dynamic" else scaled).to(TYPES[kind]), scales


def multiply(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x Wᵀ, [N, out]: codes [N, in] and [out, in], and their scales a row."""
    if x.dtype == torch.int8:
        missing = max(0, FEWEST_ROWS - len(x)) if x.is_cuda else 0
        sums = torch._int_mm(F.pad(x, (0, 0, 0, missing)), w.t())[: len(x)]  # torchao's way, too: torch has no public name for it
        return (sums * x_scales * w_scales.t()).to(dtype)
    by_row = F.ScalingType.RowWise
    exact = torch.bfloat16 if x.is_cuda else torch.float32  # a GPU's product has no other result
    return F.scaled_mm(x, w.t(), x_scales, by_row, w_scales.t().contiguous(), by_row, output_dtype=exact).to(dtype)
