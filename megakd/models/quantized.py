"""Weights stored as 8-bit codes with scales beside them: number = code × scale, in float32, rounded once to the model's dtype.

FP8 by blocks (`weight_scale_inv`), FP8 and int8 with one scale a tensor or a row (`weight_scale`): what transformers' fine-grained FP8
and compressed-tensors store, and what they dequantise to. Codes of other methods are never read as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megakd.errors import UserError

FP8, INT8 = ("F8_E4M3",), ("I8",)
FORMATS = ("float-quantized", "int-quantized", "naive-quantized")  # of compressed-tensors; the others pack several codes together
SCALES = ("_scale_inv", "_scale")
MOVED = ("_zero_point", "_g_idx")  # tensors beside codes that are not code × scale: shifted, or with columns in another order
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
BLOCK = (128, 128)  # where the config names none
ACTIVATION_SCALES = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale")  # of no use to plain weights


def quantization(config: PretrainedConfig) -> dict[str, Any]:
    """What config.json says about it; empty for plain weights."""
    said = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    return said if isinstance(said, dict) else {}


def method_of(said: dict[str, Any]) -> str:
    """The method's name, for people."""
    details = [said.get("format"), f"{bits} bits" if (bits := said.get("bits")) else None]
    details += [bits.removeprefix("load_in_") for bits in ("load_in_4bit", "load_in_8bit") if said.get(bits)]
    known = ", ".join(str(detail) for detail in details if detail)
    return f"{said.get('quant_method', 'an unnamed method')}" + (f" ({known})" if known else "")


def code_dtypes(said: dict[str, Any]) -> tuple[str, ...]:
    """safetensors' names of the dtypes whose codes can be turned into numbers."""
    if said.get("quant_method") in ("fp8", "fbgemm_fp8"):
        return FP8
    packed = said.get("quant_method") != "compressed-tensors" or said.get("format") not in FORMATS
    return () if packed else FP8 + INT8


def check_block(said: dict[str, Any], folder: str) -> None:
    """
    Raises:
        UserError: weight_block_size is no rows and columns.
    """
    block = said.get("weight_block_size") or BLOCK
    if not (isinstance(block, (list, tuple)) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise UserError(
            f"{folder}: config.json says weight_block_size {block!r}, which is no two positive numbers; copy or download it again"
        )


def block_shape(shape: tuple[int, ...], scales: tuple[int, ...], said: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the scales do not fit."""
    rows, columns = shape
    grid = (*scales, 1, 1)[:2]
    block = tuple(said.get("weight_block_size") or BLOCK)
    if grid == (-(-rows // block[0]), -(-columns // block[1])):
        return block
    fits = len(scales) <= 2 and rows % grid[0] == 0 and columns % grid[1] == 0
    return (rows // grid[0], columns // grid[1]) if fits else None


@dataclass(frozen=True)
class Scale:
    """Where the scales of a tensor of codes lie, and how many rows and columns share one."""

    name: str
    block: tuple[int, int]


def dequantize(codes: Tensor, scales: Tensor, block: tuple[int, int], first: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Numbers of a rectangle of codes that begins at row and column `first`."""
    grid = scales.float().reshape(*scales.shape, *[1] * (2 - scales.ndim))
    rows, columns = (torch.arange(lo, lo + size) // step for lo, size, step in zip(first, codes.shape, block))
    return (codes.float() * grid[rows][:, columns]).to(dtype)
