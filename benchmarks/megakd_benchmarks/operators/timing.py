"""A case measured: each implementation's error first, then time and memory. What is wrong is not timed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megakd_benchmarks.operators.baselines import by_autograd
from megakd_benchmarks.operators.cases import Case

REPETITIONS = 30
FLUSH_BYTES = 256 * 2**20
FIELDS = ("case", "implementation", "p20_ms", "p50_ms", "p80_ms", "cpu_p50_ms", "copy_share", "peak_mb", "gradient_error",
          "first_s", "note")


def gradient_error(case: Case, inputs: list[Tensor], grad: Tensor) -> float:
    """Relative distance of the gradient's first rows from float64."""
    n = case.checked_rows
    batched = [n > 0 and x.shape[0] == inputs[0].shape[0] for x in inputs]
    exact_inputs = [(x[:n] if cut else x).double() if x.is_floating_point() else x for x, cut in zip(inputs, batched)]
    exact = by_autograd(in_float64(case.exact))(*exact_inputs)[1]
    ours = (grad[:n] if n else grad).double()
    return ((ours - exact).norm() / exact.norm()).item()


def in_float64(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same formula without its own rounding to float32."""
    def run(*inputs: Tensor) -> Tensor:
        with Float64():
            return loss(*inputs)
    return run


class Float64(torch.overrides.TorchFunctionMode):
    """`x.float()` leaves float64 alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def times_ms(fn: Callable[[], object], device: torch.device, seconds: float) -> tuple[list[float], list[float]]:
    """(wall or event times, the process's own times) of up to REPETITIONS calls within about so many seconds."""
    wall, own = [], []
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    end = time.monotonic() + seconds
    while len(wall) < REPETITIONS and (len(wall) < 3 or time.monotonic() < end):
        if flush is None:
            start, start_own = time.perf_counter(), time.process_time()
            fn()
            wall.append(1e3 * (time.perf_counter() - start))
            own.append(1e3 * (time.process_time() - start_own))
        else:
            flush.zero_()
            begin, finish = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            fn()
            finish.record()
            torch.cuda.synchronize()
            wall.append(begin.elapsed_time(finish))
    return wall, own


def peak_mb(fn: Callable[[], object], device: torch.device) -> float:
    """Memory beyond what was allocated before the call, of the allocator on a GPU, by torch's own record on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0)) / 1e6


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy much larger than any cache."""
    x = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.int8, device=device)
    y = torch.empty_like(x)
    wall, _ = times_ms(lambda: y.copy_(x), device, 2.0)
    return 2 * x.nbytes / (1e-3 * statistics.median(wall))


def percentile(values: list[float], share: float) -> float:
    """The number that a `share` from 0 to 1 of them lies below; none between two is made up."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure(case: Case, device: torch.device, bandwidth: float, seconds: float) -> list[dict]:
    """One row an implementation. The error that is allowed is twice minimal eager's, so that all meet one bound."""
    inputs, rows, allowed = case.inputs(device), [], None
    order = sorted(case.implementations, key=lambda name: name != "minimal eager")
    for name in order:
        fn = case.implementations[name]
        row = dict.fromkeys(FIELDS, "") | {"case": case.name, "implementation": name}
        rows.append(row)
        if fn is None:
            row["note"] = "not installed"
            continue
        try:
            start = time.monotonic()
            grad = fn(*inputs)[1]
            synchronize(device)
            row["first_s"] = f"{time.monotonic() - start:.2f}"
        except (torch.OutOfMemoryError, MemoryError):
            row["note"] = "out of memory"
            continue
        error = gradient_error(case, inputs, grad)
        del grad
        row["gradient_error"] = f"{error:.1e}"
        allowed = 2 * error + 1e-6 if allowed is None else allowed
        if not error <= allowed:
            row["note"] = f"wrong: error above {allowed:.1e}, not timed"
            continue
        peak = peak_mb(lambda: fn(*inputs), device)  # noqa: B023, called at once
        wall, own = times_ms(lambda: fn(*inputs), device, seconds)  # noqa: B023
        for share in (20, 50, 80):
            row[f"p{share}_ms"] = f"{percentile(wall, share / 100):.3f}"
        row["cpu_p50_ms"] = f"{percentile(own, 0.5):.3f}" if own else ""
        row["copy_share"] = f"{case.bytes_needed / bandwidth / (1e-3 * percentile(wall, 0.5)):.3f}"
        row["peak_mb"] = f"{peak:.1f}"
    return rows
