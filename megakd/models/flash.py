"""flash-attn's kernels, of whichever of its packages is installed and takes a call.

    package        module             compute capability           dropout    head size
    flash-attn-4   flash_attn.cute    9 to 11: Hopper, Blackwell   no         multiples of 8, to 256 and on Blackwell to 128
    flash-attn     flash_attn         8 and later: from Ampere on  yes        to 256

The first that takes a call attends; a call that neither takes (float32, a CPU, an older card) is for torch. Both take fewer key/value
heads and sliding windows without a copy or a mask, and packed rows. https://github.com/Dao-AILab/flash-attention, README and
flash_attn/cute/README.md.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megakd.models.packed_rows import PackedRows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One of flash-attn's, and the calls that it takes. s, b, n, g, d as in `attention`."""

    name: str  # as pip has it
    module: str
    heads: Mapping[int, range]  # sizes of a head, by the major number of compute capability
    knows_dropout: bool
    no_window: tuple[int | None, int | None]  # columns before and behind a token's own, of a layer that does not slide

    def attention(
        self, query_sbnd: Tensor, key_sbgd: Tensor, value_sbgd: Tensor, dropout: float, scale: float | None, window: int | None
    ) -> Tensor:
        """[s, b, n, d]"""
        attend, _ = functions(self.module)
        query, key, value = (x.transpose(0, 1) for x in (query_sbnd, key_sbgd, value_sbgd))
        return attended(attend(query, key, value, **self.options(dropout, scale, window))).transpose(0, 1)

    def packed_attention(
        self, packed: PackedRows, query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None, window: int | None
    ) -> Tensor:
        """[s, 1, n, d] of packed rows: [s, 1, n, d] and twice [s, 1, g, d]."""
        _, attend = functions(self.module)
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        ends = {"cu_seqlens_q": packed.cu_seqlens_q, "cu_seqlens_k": packed.cu_seqlens_kv}
        longest = {"max_seqlen_q": packed.max_seqlen_q, "max_seqlen_k": packed.max_seqlen_kv}
        return attended(attend(query, key, value, **ends, **longest, **self.options(dropout, scale, window))).unsqueeze(1)

    def options(self, dropout: float, scale: float | None, window: int | None) -> dict[str, Any]:
        """Of either function."""
        reach = self.no_window if window is None else (window - 1, 0)
        own = {"dropout_p": dropout} if self.knows_dropout else {}
        same_bits = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}  # backwards: no sums by atomics
        return {**own, **same_bits, "softmax_scale": scale, "causal": True, "window_size": reach}


HEADS_OF_4 = {9: range(8, 257, 8), 10: range(8, 129, 8), 11: range(8, 129, 8)}  # _validate_head_dims of its interface.py, 4.0.0b9
PACKAGES = (
    Package("flash-attn-4", "flash_attn.cute", HEADS_OF_4, knows_dropout=False, no_window=(None, None)),
    Package("flash-attn", "flash_attn", dict.fromkeys(range(8, 100), range(1, 257)), knows_dropout=True, no_window=(-1, 0)),
)


def package_for(query: Tensor, dropout: float) -> Package | None:
    """The first that takes tensors like these; None: torch is to attend, and on a GPU a line says so once."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return None
    major, _minor = torch.cuda.get_device_capability(query.device)
    for package in PACKAGES:
        takes = query.shape[-1] in package.heads.get(major, ()) and (package.knows_dropout or not dropout)
        if takes and functions(package.module):
            return package
    say_once(bool(dropout))
    return None


@cache
def functions(module: str) -> tuple[Callable, Callable] | None:
    """For rows of one length, and for packed rows; None where the package is not there. Where flash-attn-4 is alone, `flash_attn` is a
    folder around it and holds neither."""
    try:
        found = importlib.import_module(module)
        return found.flash_attn_func, found.flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None


def attended(out: Tensor | tuple) -> Tensor:
    """Without the log-sum-exps that flash-attn-4 may return beside it."""
    return out[0] if isinstance(out, tuple) else out


@cache
def say_once(dropout: bool) -> None:
    """For calls with dropout and for those without."""
    names = " or ".join(package.name for package in PACKAGES if package.knows_dropout or not dropout)
    log.warning("no %s for this card is installed: torch's own attention runs%s", names, ", here with dropout" if dropout else "")
