"""Which implementation runs: `rows` on a CPU, Triton on a CUDA device, the reference there without Triton or in float64.

Triton is imported at the first call on a CUDA device, never with the package: its interpreter switch (TRITON_INTERPRET) is read
when a kernel is defined, and a machine without a GPU has no use for it. `use` names an implementation for a block of code; only
so is the option reached that the divergences have: `compiled`, torch.compile's version of the CPU's row functions.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)
IMPLEMENTATIONS = ("rows", "compiled", "triton", "reference")
OPTIONS = {"compiled": "rows"}  # of the divergences, and what other operators run in its place
_chosen: ContextVar[str | None] = ContextVar("implementation", default=None)


@contextmanager
def use(implementation: str) -> Iterator[None]:
    """Run the block's calls with one implementation, on any device: tests and benchmarks compare them so."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    token = _chosen.set(implementation)
    try:
        yield
    finally:
        _chosen.reset(token)


def implementation(x: Tensor, operator: str = "kl") -> str:
    """The implementation of an operator for tensors like x."""
    chosen = _chosen.get()
    if chosen in OPTIONS and operator != "kl":
        return OPTIONS[chosen]
    if chosen is not None and not (chosen in OPTIONS and x.dtype == torch.float64):  # the option is for float32 and less
        return chosen
    if x.device.type == "cpu":
        return "rows"
    return "triton" if x.dtype != torch.float64 and _triton_found() else "reference"


def kernels(x: Tensor, operator: str) -> ModuleType:
    """The module that holds an operator's functions for tensors like x."""
    return KERNELS[operator][implementation(x, operator)]()


@cache
def _triton_found() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    log.warning("Triton is not installed: the distillation losses run in plain torch, with several tensors of the logits' size")
    return False


# Modules are imported when they are asked for, by statements that every tool can follow.


def _kl_rows() -> ModuleType:
    from .kl import rows

    return rows


def _kl_compiled() -> ModuleType:
    from .kl import compiled

    return compiled


def _kl_triton() -> ModuleType:
    from .kl import triton

    return triton


def _mixture_rows() -> ModuleType:
    from .mixture import rows

    return rows


def _mixture_triton() -> ModuleType:
    from .mixture import triton

    return triton


def _cross_entropy_rows() -> ModuleType:
    from .cross_entropy import rows

    return rows


def _cross_entropy_triton() -> ModuleType:
    from .cross_entropy import triton

    return triton


def _prompt_embedding_rows() -> ModuleType:
    from .prompt_embedding import rows

    return rows


def _prompt_embedding_triton() -> ModuleType:
    from .prompt_embedding import triton

    return triton


def _gumbel_triton() -> ModuleType:
    from .gumbel import triton

    return triton


KERNELS: dict[str, dict[str, Callable[[], ModuleType]]] = {
    "kl": {"rows": _kl_rows, "compiled": _kl_compiled, "triton": _kl_triton},
    "mixture": {"rows": _mixture_rows, "triton": _mixture_triton},
    "cross_entropy": {"rows": _cross_entropy_rows, "triton": _cross_entropy_triton},
    "prompt_embedding": {"rows": _prompt_embedding_rows, "triton": _prompt_embedding_triton},
    "gumbel": {"triton": _gumbel_triton},
}
