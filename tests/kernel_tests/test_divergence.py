"""A divergence is one function of two rows of log-probabilities: its kernels equal it, and one without kernels is as exact."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path

import megakd_kernels
import pytest
import torch
from cases import NAN_ROW, WEIGHTS, assert_close, error, logits, upstream
from megakd_kernels import OBJECTIVES, fused_linear_kl, kl_div, launch, reference
from megakd_kernels.divergence import KLS, MIXTURES, divergence_function
from megakd_kernels.divergence.alpha_beta import alpha_beta
from ranks import on_ranks

N, V, HS, HT = 12, 61, 8, 5


def squared_distance(log_q, log_p, total):
    """What somebody else might write: it is in no table."""
    return total((log_q.exp() - log_p.exp()) ** 2)


def models(dtype=torch.float64, lo=0, hi=V):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    hs, Ws, ht, Wt = draw(N, HS), draw(V, HS), draw(N, HT), draw(V, HT)
    return [x.to(dtype).clone().requires_grad_() for x in (hs, Ws[lo:hi], ht, Wt[lo:hi])]


def plain(function, hs, Ws, ht, Wt, vocabulary=V, T=1.0):
    log_q, log_p = (torch.log_softmax((h @ W.t())[:, :vocabulary] / T, -1) for h, W in ((hs, Ws), (ht, Wt)))
    return function(log_q, log_p, lambda x: x.sum(-1))


@pytest.mark.parametrize("objective", KLS + MIXTURES)
def test_kernels_equal_their_function_by_autograd(objective):
    s, t = logits(2)
    function = divergence_function(objective, 0.3, 0.2)
    results = []
    s[NAN_ROW] = torch.nan
    for which in (objective, function):
        leaves = [x.clone().requires_grad_() for x in (s, t)]
        loss_N = kl_div(*leaves, objective=which, beta=0.3, alpha=0.2, temperature=1.5, weights=WEIGHTS, valid_vocab=401)
        results.append((loss_N.detach(), *torch.autograd.grad((loss_N * upstream().float()).sum(), leaves)))
    for ours, by_autograd in zip(*results):
        assert error(ours, by_autograd.double()) <= 2e-5
        assert not by_autograd[NAN_ROW].any()


def test_alpha_beta_is_the_published_formula_and_has_its_limits():
    s, t = logits(2, dtype=torch.float64)
    log_q, log_p = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    total = lambda x: x.sum(-1)
    q, p, a, b = log_q.exp(), log_p.exp(), 0.2, 0.7
    exact = -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)
    assert error(alpha_beta(log_q, log_p, total, alpha=a, beta=b), exact) <= 1e-12
    assert error(alpha_beta(log_q, log_p, total, alpha=1.0, beta=1.0), 0.5 * ((p - q) ** 2).sum(-1)) <= 1e-12
    assert error(alpha_beta(log_q, log_p, total, alpha=1.0, beta=1e-7), kl_div(s, t, objective="forward_kl")) <= 1e-5
    assert error(alpha_beta(log_q, log_p, total, alpha=1e-7, beta=1.0), kl_div(s, t, objective="reverse_kl")) <= 1e-5
    with pytest.raises(ValueError, match=r"alpha=0 and beta=1 must be positive for alpha_beta; use forward_kl"):
        alpha_beta(log_q, log_p, total, alpha=0, beta=1)


@pytest.mark.parametrize("implementation", ["rows", "reference"])
@pytest.mark.parametrize("function", [partial(alpha_beta, alpha=0.2, beta=0.7), squared_distance], ids=["alpha_beta", "squared"])
def test_from_hidden_states_any_function_equals_plain_torch(function, implementation):
    ours, exact = models(), models()
    weights = torch.arange(N, dtype=torch.float64) % 3
    with launch.use(implementation):
        loss_N = fused_linear_kl(*ours, objective=function, weights=weights, temperature=1.5, valid_vocab=57, chunk_rows=5)
    exact_N = plain(function, *exact, 57, 1.5) * weights
    assert error(loss_N.detach(), exact_N.detach()) <= 1e-12
    for a, b in zip(torch.autograd.grad(0.3 * loss_N.sum(), ours), torch.autograd.grad(0.3 * exact_N.sum(), exact)):
        assert error(a, b) <= 1e-12


def check_shards(group, bounds):
    lo, hi = bounds[group.rank()], bounds[group.rank() + 1]
    ours, exact = models(lo=lo, hi=hi), models()
    loss_N = fused_linear_kl(*ours, objective="alpha_beta", alpha=0.2, beta=0.7, valid_vocab=57, vocab_start=lo, tp_group=group, chunk_rows=5)
    exact_N = plain(partial(alpha_beta, alpha=0.2, beta=0.7), *exact, 57)
    assert error(loss_N.detach(), exact_N.detach()) <= 1e-12
    grads, exact_grads = torch.autograd.grad(loss_N.mean(), ours), torch.autograd.grad(exact_N.mean(), exact)
    for i, (a, b) in enumerate(zip(grads, exact_grads)):
        assert error(a, b[lo:hi] if i % 2 else b) <= 1e-12


@pytest.mark.parametrize("bounds", [[0, 30, V], [0, 59, V]], ids=["two ranks", "a rank of padding"])
def test_it_is_the_same_on_every_split_of_the_vocabulary(bounds):
    on_ranks(2, check_shards, bounds)


def test_the_head_gradient_is_added_to_main_grad():
    hs, Ws, ht, Wt = models(torch.bfloat16)
    ht, Wt = ht.detach(), Wt.detach()
    expected = torch.autograd.grad(fused_linear_kl(hs, Ws, ht, Wt, objective="alpha_beta").sum(), Ws)[0]
    Ws = torch.nn.Parameter(Ws.detach())
    Ws.main_grad = torch.ones(V, HS)
    fused_linear_kl(hs, Ws, ht, Wt, objective="alpha_beta", accumulate_into_main_grad=True).sum().backward()
    torch.testing.assert_close(Ws.main_grad - 1, expected.float(), rtol=2**-7, atol=1e-5)
    assert Ws.grad is None


def test_the_table_names_what_it_knows():
    assert set(KLS + MIXTURES) < set(OBJECTIVES)
    s, t = logits(2)
    assert_close(kl_div(s, t, objective="alpha_beta"), reference.kl_div(s.double(), t.double(), objective="alpha_beta"))


def test_every_triton_launch_is_made_on_the_device_of_its_tensors():
    launches = 0
    for path in Path(megakd_kernels.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        is_launch = lambda n: isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript) and ast.unparse(n.func.value).endswith("_kernel")
        guards = [n for n in ast.walk(tree) if isinstance(n, ast.With) and "on_device_of(" in ast.unparse(n.items[0])]
        guarded = {id(n) for guard in guards for n in ast.walk(guard) if is_launch(n)}
        found = {id(n) for n in ast.walk(tree) if is_launch(n)}
        assert found == guarded, path
        launches += len(found)
    assert launches == 11
