#!/usr/bin/env python3
"""Each kernel beside what one would write or install instead, from inputs to gradients, in one run on one machine.

    python scripts/benchmark_kernels.py                       # a GPU: every case of an H200, at most ten minutes
    python scripts/benchmark_kernels.py --device cpu --threads 1

A row of the CSV is one implementation of one case: milliseconds (p20, p50, p80; on a GPU by events, with the second-level cache
flushed before each repetition; on a CPU also the process's own time, which other load does not change), the share of the copy
bandwidth measured in this run that the needed bytes make of p50, the memory beyond the inputs, and the error of the gradient
against float64. What is wrong is not timed, and says so. Needed bytes: logits read twice (a mixture's three times) and a gradient
written once.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import megakd_kernels as mk
import torch
import torch.nn.functional as F
from megakd_kernels import launch
from torch import Tensor

REPETITIONS = 30
FLUSH_BYTES = 256 * 2**20
CHECKED_ROWS = 32  # rows of a gradient compared with float64: the whole would not fit
FIELDS = ("case", "implementation", "p20_ms", "p50_ms", "p80_ms", "cpu_p50_ms", "copy_share", "peak_mb", "gradient_error",
          "first_s", "note")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


# ---------------------------------------------------------------------------------------------- what others write
# Each takes its logits (the first requires a gradient) and returns the summed loss.


def promptkd_formula(s: Tensor, t: Tensor) -> Tensor:
    """Reverse KL as PromptKD's distillation code writes it: probabilities in float32, infinities masked, summed twice."""
    q = F.softmax(s, dim=-1, dtype=torch.float32)
    teacher = torch.masked_fill(q * F.log_softmax(t, dim=-1, dtype=torch.float32), torch.isinf(t), 0)
    student = torch.masked_fill(q * F.log_softmax(s, dim=-1, dtype=torch.float32), torch.isinf(s), 0)
    return (student - teacher).sum()


def minimal(a: Tensor, b: Tensor) -> Tensor:
    """KL(a || b) in one line of autograd."""
    log_a, log_b = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    return (log_a.exp() * (log_a - log_b)).sum()


def jsd(s: Tensor, t: Tensor) -> Tensor:
    """JSD(0.5) by torch's kl_div, from log-probabilities."""
    log_q, log_p = F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0))
    return 0.5 * sum(F.kl_div(log_m, log_x, reduction="sum", log_target=True) for log_x in (log_q, log_p))


def two_passes(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Reverse KL and its gradient in the form that torch.compile fuses best: statistics, then gradient."""
    a, b = s.float(), t.float()
    top_a, top_b = a.amax(-1, keepdim=True), b.amax(-1, keepdim=True)
    e = (a - top_a).exp()
    sum_a, sum_b = e.sum(-1, keepdim=True), (b - top_b).exp().sum(-1, keepdim=True)
    kl = (e * ((a - top_a) - (b - top_b))).sum(-1, keepdim=True) / sum_a - sum_a.log() + sum_b.log()
    x = a - (top_a + sum_a.log())
    return kl.sum(), (x.exp() * (x - (b - (top_b + sum_b.log())) - kl)).to(s.dtype)


def prompt_two_passes(t: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """KL(t || s) + 0.7 KL(t || b) and its gradient, in the same form."""
    log_t, log_s, log_b = (x - x.logsumexp(-1, keepdim=True) for x in (t.float(), s.float(), b.float()))
    p, ratio = log_t.exp(), (log_t - log_s) + 0.7 * (log_t - log_b)
    loss = (p * ratio).sum(-1, keepdim=True)
    return loss.sum(), (p * (ratio - loss)).to(t.dtype)


def jsd_two_passes(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """JSD(0.5) and its gradient, in the same form."""
    log_q, log_p = (x - x.logsumexp(-1, keepdim=True) for x in (s.float(), t.float()))
    log_m = torch.logaddexp(log_q, log_p) - torch.log(torch.tensor(2.0))
    y = (log_q.exp() * (log_q - log_m)).sum(-1, keepdim=True)
    loss = 0.5 * ((log_p.exp() * (log_p - log_m)).sum() + y.sum())
    return loss, (0.5 * log_q.exp() * (log_q - log_m - y)).to(s.dtype)


def by_autograd(loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(loss, gradient of the first input)"""
    def run(first: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        leaf = first.detach().requires_grad_()
        value = loss(leaf, *others)
        value.backward()
        return value.detach(), leaf.grad
    return run


def chosen(implementation: str, loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same, by the implementation that `launch.use` takes."""
    run = by_autograd(loss)

    def inside(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with launch.use(implementation):
            return run(*inputs)
    return inside


def megakd(loss: Callable[..., Tensor], device: str, option: bool = True) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    """Ours as it comes, and by the option that the divergences have on a CPU."""
    ours = {"megakd": by_autograd(loss)}
    if option and device == "cpu":
        ours["megakd, compiled"] = chosen("compiled", loss)
    return ours


def liger_reverse_kl() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Liger's JSD at beta = 1 is the reverse KL, from log-probabilities; None where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.jsd import LigerJSD

    loss = LigerJSD(beta=1.0)
    return by_autograd(lambda s, t: loss(F.log_softmax(s.float(), -1), F.log_softmax(t.float(), -1)) * s.shape[0])


# ---------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One size of one loss, and all who compute it."""

    name: str
    inputs: Callable[[torch.device], list[Tensor]]
    exact: Callable[..., Tensor]      # the loss in plain torch, called with float64 inputs
    bytes_needed: int
    implementations: dict[str, Callable[..., tuple[Tensor, Tensor]] | None]
    checked_rows: int = CHECKED_ROWS  # of the first input; 0 compares all of it with all rows in float64


def logits(rows: int, columns: int, models: int) -> Callable[[torch.device], list[Tensor]]:
    """Peaked student logits in bfloat16, correlated teachers, one row in eight equal to the student's."""
    def make(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda: torch.randn(rows, columns, generator=generator, device=device)
        student = 4 * draw()
        teachers = [(0.8 * student + 2 * draw()).where((torch.arange(rows, device=device) % 8 != 0)[:, None], student)
                    for _ in range(models - 1)]
        return [x.bfloat16() for x in (student, *teachers)]
    return make


def reverse_kl_case(rows: int, columns: int, device: str) -> Case:
    """10 bytes an element: two bfloat16 logits read twice, one gradient written."""
    others = {
        "PromptKD's formula": by_autograd(promptkd_formula),
        "minimal eager": by_autograd(minimal),
        "torch.compile, autograd": by_autograd(torch.compile(minimal)),
        "torch.compile, two passes": torch.compile(two_passes),
        "Liger JSD": liger_reverse_kl() if device == "cuda" else None,
    }
    ours = megakd(lambda s, t: mk.kl_div(s, t).sum(), device)
    return Case(f"reverse KL {rows}x{columns}", logits(rows, columns, 2), minimal, 10 * rows * columns, {**others, **ours})


def prompt_case(rows: int, columns: int, device: str) -> Case:
    """14 bytes an element: three logits read twice, one gradient written."""
    sum_of_two = lambda kl: lambda t, s, b: kl(t, s) + 0.7 * kl(t, b)
    return Case(f"prompt loss {rows}x{columns}", logits(rows, columns, 3), sum_of_two(minimal), 14 * rows * columns, {
        "PromptKD's formula": by_autograd(sum_of_two(promptkd_formula)),
        "minimal eager": by_autograd(sum_of_two(minimal)),
        "torch.compile, autograd": by_autograd(torch.compile(sum_of_two(minimal))),
        "torch.compile, two passes": torch.compile(prompt_two_passes),
        **megakd(lambda t, s, b: mk.promptkd_loss(t, s, b, base_coef=0.7)[0].sum(), device),
    })


def jsd_case(rows: int, columns: int, device: str) -> Case:
    """14 bytes an element: two logits read three times, for a mixture needs its normalisers first; one gradient written."""
    return Case(f"JSD {rows}x{columns}", logits(rows, columns, 2), jsd, 14 * rows * columns, {
        "minimal eager": by_autograd(jsd),
        "torch.compile, autograd": by_autograd(torch.compile(jsd)),
        "torch.compile, two passes": torch.compile(jsd_two_passes),
        **megakd(lambda s, t: mk.kl_div(s, t, objective="jsd").sum(), device, option=False),
    })


def fused_case(rows: int, columns: int, student: int, teacher: int, device: str) -> Case:
    """Both heads and the reverse KL; the student's head learns, and its gradient is made but hidden states' is compared."""
    def inputs(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        tensors = [draw(rows, student), 3 * draw(columns, student) / student**0.5,
                   draw(rows, teacher), 3 * draw(columns, teacher) / teacher**0.5]
        return [x.bfloat16() for x in tensors]

    def with_weight(kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda hs, Ws, ht, Wt: kl(hs, Ws.detach().requires_grad_(hs.requires_grad), ht, Wt)

    whole = lambda hs, Ws, ht, Wt: minimal(hs @ Ws.t(), ht @ Wt.t())
    return Case(f"fused head {rows}x{columns}, {student}/{teacher}", inputs, whole, 10 * rows * columns, {
        "minimal eager": by_autograd(with_weight(whole)),
        "torch.compile, autograd": by_autograd(torch.compile(with_weight(whole))),
        **megakd(with_weight(lambda *x: mk.fused_linear_kl(*x).sum()), device),
    })


def embedding_case(batch: int, length: int, hidden: int) -> Case:
    """The gradient is that of the soft prompt; upstream is one."""
    def inputs(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        tokens = torch.randint(0, 50257, (batch, length), generator=generator, device=device)
        return [draw(7, hidden), draw(50257, hidden).bfloat16(), draw(length + 7, hidden).bfloat16(), tokens]

    def plain(prompt: Tensor, words: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        x = torch.cat([prompt.to(words.dtype).expand(len(tokens), -1, -1), F.embedding(tokens, words)], 1)
        return (x + positions).sum()

    rows = batch * (length + 7)
    return Case(f"prompt embedding {batch}x{length}x{hidden}", inputs, plain, 4 * rows * hidden, {
        "minimal eager": by_autograd(plain),
        "torch.compile, autograd": by_autograd(torch.compile(plain)),
        "megakd": by_autograd(lambda p, w, pos, ids: mk.prompt_embedding(ids, w, p, pos).sum()),
    }, checked_rows=0)


def cases(device: str) -> list[Case]:
    """The sizes whose targets are written down come first; small ones, where launches cost most, are kept."""
    if device == "cpu":
        return [reverse_kl_case(512, 50257, device), reverse_kl_case(64, 128256, device), prompt_case(128, 50257, device),
                jsd_case(128, 50257, device), fused_case(256, 50257, 256, 512, device), embedding_case(8, 512, 1600)]
    return [reverse_kl_case(8192, 128256, device), prompt_case(8192, 128256, device), fused_case(8192, 128256, 4096, 4096, device),
            jsd_case(8192, 128256, device), reverse_kl_case(8192, 50257, device), reverse_kl_case(8192, 32000, device),
            reverse_kl_case(8192, 16032, device), fused_case(8192, 50257, 768, 1600, device), embedding_case(8, 1024, 5120),
            reverse_kl_case(1024, 151936, device), reverse_kl_case(64, 32000, device)]


# ---------------------------------------------------------------------------------------------- measuring


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


# ---------------------------------------------------------------------------------------------- writing


def machine(device: torch.device, bandwidth: float, threads: int) -> dict[str, str]:
    """What a number means nothing without: the head of the CSV."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, {threads} thread(s)"
    triton = metadata.version("triton") if device.type == "cuda" and importlib.util.find_spec("triton") else "not used"
    return {"device": name, "torch": torch.__version__, "triton": triton, "python": platform.python_version(),
            "commit": commit.stdout.strip() or "unknown", "date": date.today().isoformat(),
            "copy bandwidth": f"{bandwidth / 1e9:.1f} GB/s",
            "command": " ".join(["python", "scripts/benchmark_kernels.py", *sys.argv[1:]])}


def write(path: Path, header: dict[str, str], rows: list[dict]) -> None:
    """The CSV, which opens with where its numbers come from, and a figure of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    if importlib.util.find_spec("matplotlib") is not None:
        draw(path.with_suffix(".png"), header, rows)


def draw(path: Path, header: dict[str, str], rows: list[dict]) -> None:
    """Bars of p50, on a CPU of its own time, and the memory beyond the inputs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row["p50_ms"]]
    names = list(dict.fromkeys(row["case"] for row in timed))
    figure, axes = plt.subplots(len(names), 1, figsize=(9, 1.7 * len(names)), squeeze=False)
    clock = "cpu_p50_ms" if header["device"].endswith("thread(s)") else "p50_ms"
    for axis, name in zip(axes[:, 0], names):
        mine = [row for row in timed if row["case"] == name]
        values = [float(row[clock]) for row in mine]
        bars = axis.barh([row["implementation"] for row in mine], values,
                         color=["#c44e52" if row["implementation"].startswith("megakd") else "#8c8c8c" for row in mine])
        labels = [f"{value:.3g} ms, +{float(row['peak_mb']):.0f} MB" for value, row in zip(values, mine)]
        axis.bar_label(bars, labels, padding=3, fontsize=7)
        axis.set_title(name, fontsize=9, loc="left")
        axis.set_xlim(0, 1.35 * max(values))
        axis.invert_yaxis()
        axis.tick_params(labelsize=7)
    clock_name = "own time" if clock == "cpu_p50_ms" else "median time"
    figure.suptitle(f"loss and gradient, {clock_name}, {header['device']}, torch {header['torch']}, {header['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--seconds", type=float, default=4.0, help="at most, for the repetitions of one implementation")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which no further case is started")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--out", type=Path, default=None, help="where to write, no suffix [benchmarks/results/kernels_<device>]")
    args = parser.parse_args()
    out = args.out or RESULTS / f"kernels_{args.device}"
    table, figure = out.with_suffix(".csv"), out.with_suffix(".png")
    if (table.exists() or figure.exists()) and not (table.is_file() and table.read_text(errors="replace").startswith("# device: ")):
        parser.error(f"--out {out}: {table.name} or {figure.name} is there, and no benchmark wrote it; give another name")
    torch.set_num_threads(args.threads)
    device, start = torch.device(args.device), time.monotonic()
    bandwidth = copy_bandwidth(device)
    header = machine(device, bandwidth, args.threads)  # now: the working tree may change while this runs
    rows = []
    for case in cases(args.device):
        if args.only not in case.name:
            continue
        if time.monotonic() - start > args.limit:
            rows.append(dict.fromkeys(FIELDS, "") | {"case": case.name, "note": f"not started: {args.limit:.0f} s were over"})
            continue
        for row in measure(case, device, bandwidth, args.seconds):
            rows.append(row)
            print(" | ".join(str(row[field]) for field in FIELDS), flush=True)
        torch.compiler.reset()
    write(out, header, rows)


if __name__ == "__main__":
    main()
