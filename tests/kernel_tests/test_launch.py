"""Which implementation runs where, and what importing the package costs."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from cases import logits
from megakd_kernels import cross_entropy, kl_div, launch


def test_importing_and_running_on_a_cpu_never_imports_triton():
    code = ("import sys, torch, megakd_kernels as mk; mk.kl_div(torch.zeros(2, 5), torch.zeros(2, 5)); "
            "mk.prompt_embedding(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(4, 3), torch.zeros(1, 3)); "
            "assert 'triton' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_gpu_without_triton_takes_the_reference_and_says_so_once(monkeypatch, caplog):
    on_a_gpu = type("OnAGpu", (), {"device": torch.device("cuda"), "dtype": torch.bfloat16})()
    assert launch.implementation(on_a_gpu) == "triton"
    launch._triton_found.cache_clear()
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert [launch.implementation(on_a_gpu) for _ in range(3)] == ["reference"] * 3
    launch._triton_found.cache_clear()
    assert [r.message for r in caplog.records] == [
        "Triton is not installed: the distillation losses run in plain torch, with several tensors of the logits' size"]


def test_float64_on_a_gpu_takes_the_reference():
    on_a_gpu = type("OnAGpu", (), {"device": torch.device("cuda"), "dtype": torch.float64})()
    assert launch.implementation(on_a_gpu) == "reference"


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="use one of rows, compiled, triton, reference"), launch.use("cuda"):
        pass


def test_the_operators_are_opaque_to_torch_compile():
    """Fake implementations: shapes and dtypes of what the kernels return, without running them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), launch.use("triton"):
        s, t = torch.empty(6, 50, dtype=torch.bfloat16, requires_grad=True), torch.empty(6, 50, dtype=torch.bfloat16)
        for objective in ("reverse_kl", "jsd"):
            loss_N = kl_div(s, t, objective=objective)
            loss_N.sum().backward()
            assert loss_N.shape == (6,) and loss_N.dtype == torch.float32 and s.grad.dtype == torch.bfloat16


PROGRAMS = 8  # a multiprocessor: test_machine_code.py holds that no more fit at once


class Recorder:
    """A kernel that notes how many warps each launch asks for."""

    def __init__(self, kernel):
        self.kernel, self.warps = kernel, []

    def __getitem__(self, grid):
        def run(*args, num_warps, **constants):
            self.warps.append(num_warps)
            self.kernel[grid](*args, num_warps=num_warps, **constants)

        return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's")
def test_amd_gets_half_as_many_warps_of_twice_the_threads(monkeypatch):
    pytest.importorskip("triton")
    from megakd_kernels.cross_entropy import triton as cross_entropy_triton
    from megakd_kernels.kl import triton as kl_triton
    from megakd_kernels.mixture import triton as mixture_triton

    kernels = [(kl_triton, "statistics_kernel", 4), (kl_triton, "merge_kernel", 4), (kl_triton, "gradient_kernel", 8),
               (mixture_triton, "mixture_sums_kernel", 8), (mixture_triton, "mixture_gradient_kernel", 8),
               (cross_entropy_triton, "label_statistics_kernel", 8), (cross_entropy_triton, "label_gradient_kernel", 8)]  # fmt: skip
    for module, name, _ in kernels:
        monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    s, t = (x.requires_grad_() for x in logits(2))
    for hip in (None, "6.4"):
        monkeypatch.setattr(torch.version, "hip", hip)
        with launch.use("triton"):
            kl_div(s, t).sum().backward()
            kl_div(s, t, objective="jsd").sum().backward()
            cross_entropy(s, torch.zeros(len(s), dtype=torch.int64)).sum().backward()
    for module, name, warps in kernels:
        seen = getattr(module, name).warps
        half = len(seen) // 2
        assert seen == [warps] * half + [warps // 2] * half and half, name


def test_a_launch_splits_rows_until_the_devices_multiprocessors_are_full(monkeypatch):
    pytest.importorskip("triton")
    from megakd_kernels import triton_rows

    assert triton_rows.PROGRAMS == PROGRAMS
    x = torch.empty(100, 32000)
    assert triton_rows.split_over(x, 4096)[0] == 11  # 8 × 132 programs on an H200
    monkeypatch.setattr(triton_rows, "MULTIPROCESSORS", 40)
    assert triton_rows.split_over(x, 4096)[0] == 4
    assert triton_rows.split_over(torch.empty(100, 7), 4096)[0] == 4, "the same on a rank of another width"
