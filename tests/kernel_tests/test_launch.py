"""Which implementation runs where, and what importing the package costs."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from megakd_kernels import kl_div, launch


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
