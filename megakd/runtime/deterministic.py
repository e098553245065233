"""--deterministic-mode: the same run on the same GPUs gives the same bits, as it does on a CPU in any case.

torch takes its deterministic algorithms, or raises where it has none; flash-attn (models/flash.py) and megatron's embedding have a second
way backwards, which they take when torch's switch is on. Variables of the libraries below have to be set before the first product or
message: https://docs.nvidia.com/megatron-core/developer-guide/latest/user-guide/deterministic-training.html, whose values these are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megakd.errors import UserError

VARIABLES = {  # the first is set where there is none
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),  # the order of a ring's sums is its topology's
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
}


@contextmanager
def deterministic_mode(on: bool) -> Iterator[None]:
    """While a run lasts; `on` being False changes nothing of what the caller has set.

    Raises:
        UserError: the environment says otherwise.
    """
    if not on:
        yield
        return
    set_variables()
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # what torch would fill is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def set_variables() -> None:
    """Those of the libraries.

    Raises:
        UserError: one is set to what promises nothing.
    """
    for name, values in VARIABLES.items():
        if (value := os.environ.setdefault(name, values[0])) not in values:
            raise UserError(f"--deterministic-mode: {name} is {value} in the environment; unset it, or use {' or '.join(values)}")
