"""Logits to test with, float64 answers, and how far from them is far."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

IMPLEMENTATIONS = ["rows", "triton"]
INTERPRETED = not torch.cuda.is_available()
WEIGHTS = torch.tensor([1.0, 0.0, 0.3, 2.0, 1.0])
NAN_ROW = 1  # the row of weight 0 holds NaN: whoever reads it is found out


def device_of(implementation: str) -> str:
    return "cuda" if implementation == "triton" and not INTERPRETED else "cpu"


def logits(models: int, columns: int = 403, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Correlated models with offsets of their own, [5, columns]: peaked rows, exactly representable in dtype."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(len(WEIGHTS), columns, generator=generator, dtype=torch.float64)
    first = 3 * draw() + 11
    return [(x - 20 * i).to(dtype) for i, x in enumerate([first, *(0.7 * first + 2 * draw() for _ in range(models - 1))])]


def upstream(dtype: torch.dtype = torch.float64) -> Tensor:
    """A gradient of the loss that differs from row to row."""
    return torch.tensor([0.5, 1.0, 2.0, 0.25, 1.5], dtype=dtype)


def error(ours: Tensor, exact: Tensor) -> float:
    """Distance relative to the answer's size."""
    return ((ours.double().cpu() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def assert_close(ours: Tensor, exact: Tensor, torch_same_dtype: Tensor | None = None) -> None:
    """float32 within 2e-5; narrower at most twice torch's own error, or where that is not given within one ulp each."""
    assert ours.isfinite().all()
    if ours.dtype == torch.float32:
        assert error(ours, exact) <= 2e-5
    elif torch_same_dtype is None:
        ulp = 2**-7 if ours.dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(ours.double(), exact, rtol=ulp, atol=3e-7)
    else:
        assert error(ours, exact) <= 2 * error(torch_same_dtype, exact) + 1e-7


def yardstick(same_dtype: Tensor, implementation: str) -> Tensor | None:
    """torch's own answer, unless stores truncate, as interpreted Triton's do."""
    return None if INTERPRETED and implementation == "triton" else same_dtype


def peak_bytes(fn: Callable[[], object]) -> int:
    """The most that fn allocates on a CPU at a time, by torch's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
