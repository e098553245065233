"""Which implementation runs: `rows` on a CPU, Triton on a CUDA device, the reference there without Triton or in float64.

Triton is imported at the first call on a CUDA device, never with the package: its interpreter switch (TRITON_INTERPRET) is read
when a kernel is defined, and a machine without a GPU has no use for it. `use` names an implementation for a block of code; only
so are the two options reached, which exist for the divergences: `compiled`, torch.compile's version of the CPU's row functions, and
`single_launch`, which on one GPU reads each logit once.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)
IMPLEMENTATIONS = ("rows", "compiled", "triton", "single_launch", "reference")
OPTIONS = {"compiled": "rows", "single_launch": "triton"}  # of the divergences, and what other operators run in their place
_chosen: str | None = None


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run the block's calls with one implementation, on any device: tests and benchmarks compare them so."""
    global _chosen
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    before, _chosen = _chosen, implementation
    try:
        yield
    finally:
        _chosen = before


def implementation(x: Tensor, operator: str = "kl") -> str:
    """The implementation of an operator for tensors like x."""
    if _chosen in OPTIONS and operator != "kl":
        return OPTIONS[_chosen]
    if _chosen is not None and not (_chosen in OPTIONS and x.dtype == torch.float64):  # the options are for float32 and less
        return _chosen
    if x.device.type == "cpu":
        return "rows"
    return "triton" if x.dtype != torch.float64 and _triton_found() else "reference"


def kernels(x: Tensor, operator: str) -> ModuleType:
    """The module that holds an operator's functions for tensors like x: megakd_kernels.<operator>_<implementation>."""
    return importlib.import_module(f".{operator}_{implementation(x, operator)}", __package__)


@cache
def _triton_found() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    log.warning("Triton is not installed: the distillation losses run in plain torch, with several tensors of the logits' size")
    return False
