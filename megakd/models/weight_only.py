"""A frozen model with the weights of its layers' products as 8- or 4-bit codes, by torchao; numbers again where they are used, a layer
at a time, so that every path of a model (training through it, sequence parallelism, decoding) is the one of plain weights. The dynamic
kinds multiply their codes where no gradient passes (eight_bit.py).

    int8    w ≈ scale · code, code in -128 .. 127, a scale a row of the whole weight, whichever ranks hold its columns
    int4    the same in -8 .. 7, a scale for every 32 neighbours of a row where a rank holds whole such groups, else a row; two codes a byte
    int8-dynamic, fp8-dynamic    a scale a row of the whole weight

Embeddings, norms, biases and the output layer stay as they are. Scales are float32.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor
from torch.nn.utils import parametrize

from megakd.errors import UserError
from megakd.models import eight_bit
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.linear import ColumnLinear, RowLinear

BOUNDS = {"int8": (-128, 127), "int4": (-8, 7)}
GROUP = 32  # columns, of int4


def check_quantization(kind: str) -> None:
    """
    Raises:
        UserError: torchao is needed and not there.
    """
    if kind == "fp8-dynamic" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        raise UserError("--teacher-quantize fp8-dynamic needs a card of compute capability 8.9 (Ada, Hopper) or later; use int8-dynamic")
    if kind in BOUNDS and find_spec("torchao") is None:
        raise UserError(f"--teacher-quantize {kind} needs torchao; install it (pip install torchao), or leave the flag out")


def quantize(model: HiddenStateGPTModel, kind: str) -> None:
    """In place, on all ranks of the model at once."""
    for module in model.decoder.modules():
        if isinstance(module, (ColumnLinear, RowLinear)):
            codes = eight_bit.DynamicCodes if kind in eight_bit.TYPES else Codes
            group = module.tp_group if isinstance(module, RowParallelLinear) else None  # whose rows are cut
            parametrize.register_parametrization(module, "weight", codes(kind, module.weight, group), unsafe=True)
            if kind in eight_bit.TYPES and eight_bit.fits(module.weight):
                module.multiply = eight_bit.EightBitProduct.of(module)


class Codes(torch.nn.Module):
    """How one weight is stored: what torch calls a parametrization. `group`: the ranks that hold the other columns of its rows."""

    def __init__(self, kind: str, weight: Tensor, group: dist.ProcessGroup | None):
        super().__init__()
        self.kind, self.dtype, self.group = kind, weight.dtype, group
        in_groups = kind == "int4" and weight.shape[1] % GROUP == 0
        self.block = (1, GROUP if in_groups else weight.shape[1])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, packed where they have 4 bits, and scales [rows, groups]."""
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine_with_min_max, quantize_affine

        low, high = self._ends(weight.float())
        bounds = BOUNDS[self.kind]
        scales, zeros = choose_qparams_affine_with_min_max(
            low, high, MappingType.SYMMETRIC, self.block, torch.int8, *bounds, eps=torch.finfo(torch.float32).tiny,
            scale_dtype=torch.float32, zero_point_dtype=torch.int8,
        )  # fmt: skip
        codes = quantize_affine(weight.float(), self.block, scales, zeros, torch.int8, *bounds)
        return (pack(codes) if self.kind == "int4" else codes), scales

    def _ends(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, groups] least and greatest number of each group, of a row over all ranks that have part of it."""
        low, high = weight.unflatten(1, (-1, self.block[1])).aminmax(dim=-1)
        if self.group is not None and self.group.size() > 1 and self.block[1] == weight.shape[1]:
            dist.all_reduce(low, dist.ReduceOp.MIN, group=self.group)
            dist.all_reduce(high, dist.ReduceOp.MAX, group=self.group)
        return low, high

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weight."""
        from torchao.quantization.quant_primitives import dequantize_affine

        codes = unpack(codes, self.block[1] * scales.shape[1]) if self.kind == "int4" else codes
        zeros = torch.zeros_like(scales, dtype=torch.int8)
        return dequantize_affine(codes, self.block, scales, zeros, torch.int8, *BOUNDS[self.kind], output_dtype=self.dtype)


def pack(codes: Tensor) -> Tensor:
    """Two neighbours of a row in a byte, the first in its lower half; an odd one has a 0 beside it."""
    codes = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).view(torch.uint8)
    return (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """The codes again."""
    both = torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :columns].to(torch.int8)
    return torch.where(both > 7, both - 16, both)


def stored_bytes(model: HiddenStateGPTModel) -> int:
    """Of all parameters on this rank."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
