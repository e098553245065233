"""torch.compile's version of the CPU's row functions gives what they give."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import NAN_ROW, WEIGHTS, assert_close, logits, upstream
from megakd_kernels import kl_div, launch, promptkd_loss, reference

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
