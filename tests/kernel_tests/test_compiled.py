"""torch.compile's version of the CPU's row functions gives what they give."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import NAN_ROW, WEIGHTS, assert_close, logits, peak_bytes, upstream
from megakd_kernels import kl_div, launch, promptkd_loss, reference
from megakd_kernels.kl import compiled as kl_compiled
from megakd_kernels.kl import rows as kl_rows

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")]


def test_divergence_and_prompt_loss_equal_float64():
    s, t, b = logits(3)
    exact_s, exact_t = s.double().requires_grad_(), t.double().requires_grad_()
    exact = [reference.kl_div(exact_s, t.double(), temperature=2.0, weights=WEIGHTS.double()),
             reference.promptkd_loss(exact_t, s.double(), b.double(), base_coef=0.7, weights=WEIGHTS.double())[0]]
    for loss_N in exact:
        (loss_N * upstream()).sum().backward()
    delta = t - b
    for x in (s, t):
        x[NAN_ROW] = torch.nan
        x.requires_grad_()
    with launch.use("compiled"):
        ours = [kl_div(s, t.detach(), temperature=2.0, weights=WEIGHTS),
                promptkd_loss(t, s.detach(), base_delta=delta, base_coef=0.7, weights=WEIGHTS)[0]]
        for loss_N in ours:
            (loss_N * upstream().float()).sum().backward()
    for a, b in zip((*ours, s.grad, t.grad), (*exact, exact_s.grad, exact_t.grad)):
        assert_close(a.detach(), b.detach())


def test_both_gradients_over_the_logits_themselves():
    s, t = logits(2)
    exact = [x.double().requires_grad_() for x in (s, t)]
    (reference.kl_div(*exact) * upstream()).sum().backward()
    leaves = [x.clone().requires_grad_() for x in (s, t)]
    a, b = (x * 1 for x in leaves)
    with launch.use("compiled"):
        (kl_div(a, b, inplace=True) * upstream().float()).sum().backward()
    for leaf, x in zip(leaves, exact):
        assert_close(leaf.grad, x.grad)


def test_in_place_each_gradient_has_its_own_models_digits():
    s, t = logits(2)
    s = s.bfloat16()
    exact = [x.double().requires_grad_() for x in (s, t)]
    (reference.kl_div(*exact) * upstream()).sum().backward()
    leaves = [x.clone().requires_grad_() for x in (s, t)]
    with launch.use("compiled"):
        (kl_div(*(x * 1 for x in leaves), inplace=True) * upstream().float()).sum().backward()
    assert_close(leaves[1].grad, exact[1].grad)


def test_an_empty_shard_is_left_to_the_rows():
    with launch.use("compiled"):
        assert kl_compiled.statistics(torch.empty(3, 0), torch.empty(3, 0)).equal(kl_rows.statistics(torch.empty(3, 0), torch.empty(3, 0)))


def test_as_many_versions_are_compiled_as_calls_have_forms():
    """Past torch's usual eight it would run the loops eagerly, with a dozen tensors of the logits' size."""
    rows, columns = 40, 5000
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for weights in (None, torch.arange(rows).clamp_max(1).float(), torch.eye(rows)[0]):
            for objective in ("forward_kl", "reverse_kl"):
                s, t = (torch.randn(rows, columns).to(dtype) for _ in range(2))
                with launch.use("compiled"):
                    run = lambda: kl_div(s.requires_grad_(), t, objective=objective, weights=weights).sum().backward()  # noqa: B023
                    run()
                    s.grad = None
                    assert peak_bytes(run) <= 5 * s.nbytes  # the gradient, and copies of the rows that count
