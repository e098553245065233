"""Divergences from a truncated teacher equal plain torch on full rows, in float64, value and gradient, on every vocabulary split."""

from __future__ import annotations

import pytest
import torch
from cases import error
from megakd_kernels import TopKRows, fused_linear_kl, fused_linear_topk_kl, fused_linear_topk_kl_with_bias, launch
from ranks import on_ranks

N, V, H, K = 12, 61, 8, 6
REAL = 57  # the columns past it are padding
implementations = pytest.mark.parametrize("implementation", ["rows", "reference"])
objectives = pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd", "tvd", "alpha_beta"])


def case(k=K, dtype=torch.float64):
    """Student's hidden states and head, the teacher's whole log-probabilities, and its k most likely tokens."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    hidden, weight, log_p = draw(N, H), draw(V, H), torch.log_softmax(2 * draw(N, REAL), -1)
    top = log_p.topk(k, -1)
    rest = log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1)
    order = torch.randperm(k, generator=generator)
    rows = TopKRows(top.indices[:, order], top.values[:, order], rest)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), log_p, rows


def plain(hidden, weight, rows, objective):
    """The definition on whole rows: probabilities, summed bucket by bucket."""
    q = torch.softmax((hidden @ weight.t())[:, :REAL], -1)
    tokens = q.gather(1, rows.ids_NK)
    rest = (q * torch.ones_like(q).scatter(1, rows.ids_NK, 0.0)).sum(-1, keepdim=True)
    q, p = torch.cat([tokens, rest], -1), torch.cat([rows.log_probs_NK, rows.log_rest_N[:, None]], -1).exp()
    kl = lambda a, b: (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1)
    a, b = 0.2, 0.3
    return {"forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p),
            "jsd": lambda: b * kl(p, b * p + (1 - b) * q) + (1 - b) * kl(q, b * p + (1 - b) * q),
            "tvd": lambda: 0.5 * (q - p).abs().sum(-1),
            "alpha_beta": lambda: -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b),
            }[objective]()


OPTIONS = {"alpha": 0.2, "beta": 0.3, "valid_vocab": REAL, "chunk_rows": 5}


@implementations
@objectives
def test_value_and_gradient_equal_plain_torch_on_whole_rows(objective, implementation):
    hidden, weight, _, rows = case()
    weights = torch.arange(N, dtype=torch.float64) % 3
    exact_N = plain(hidden, weight, rows, objective) * weights
    exact = torch.autograd.grad(0.3 * exact_N.sum(), (hidden, weight))
    rows.log_probs_NK[weights == 0] = torch.nan  # a row of weight 0 is not read
    with launch.use(implementation):
        loss_N = fused_linear_topk_kl(hidden, weight, rows, objective=objective, weights=weights, **OPTIONS)
        grads = torch.autograd.grad(0.3 * loss_N.sum(), (hidden, weight))
    assert error(loss_N.detach(), exact_N.detach()) <= 1e-12
    for a, b in zip(grads, exact):
        assert error(a, b) <= 1e-12
    assert grads[1][:REAL].any(-1).all() and not grads[1][REAL:].any()  # every column, and no padding


@implementations
@objectives
def test_the_whole_vocabulary_as_support_gives_the_exact_divergence(objective, implementation):
    hidden, weight, log_p, rows = case(REAL)
    assert rows.log_rest_N.isneginf().all()
    with launch.use(implementation):
        loss_N = fused_linear_topk_kl(hidden, weight, rows, objective=objective, **OPTIONS)
        grads = torch.autograd.grad(loss_N.mean(), (hidden, weight))
    teacher = torch.cat([log_p, torch.zeros(N, V - REAL)], -1)  # hidden states of an identity head are logits
    exact_N = fused_linear_kl(hidden, weight, teacher, torch.eye(V, dtype=torch.float64), objective=objective, **OPTIONS)
    assert error(loss_N.detach(), exact_N.detach()) <= 1e-12
    for a, b in zip(grads, torch.autograd.grad(exact_N.mean(), (hidden, weight))):
        assert error(a, b) <= 1e-11


@implementations
def test_a_teacher_without_a_rest(implementation):
    hidden, weight, _, rows = case()
    rows = TopKRows(rows.ids_NK, torch.log_softmax(rows.log_probs_NK, -1), torch.full((N,), -torch.inf, dtype=torch.float64))
    exact_N = plain(hidden, weight, rows, "forward_kl")
    with launch.use(implementation):
        loss_N = fused_linear_topk_kl(hidden, weight, rows, **OPTIONS)
        grads = torch.autograd.grad(loss_N.mean(), (hidden, weight))
        reverse_N = fused_linear_topk_kl(hidden, weight, rows, objective="reverse_kl", **OPTIONS)
    assert error(loss_N.detach(), exact_N.detach()) <= 1e-12
    for a, b in zip(grads, torch.autograd.grad(exact_N.mean(), (hidden, weight))):
        assert error(a, b) <= 1e-12
    assert (reverse_N > 1e20).all() and reverse_N.isfinite().all()


@objectives
def test_it_bounds_the_exact_divergence_from_below_and_rises_with_k(objective):
    if objective == "alpha_beta":
        pytest.skip("data processing holds for f-divergences")
    values = [fused_linear_topk_kl(hidden, weight, rows, objective=objective, **OPTIONS).mean().item()
              for hidden, weight, _, rows in map(case, (1, K, 30, REAL))]
    assert values == sorted(values) and values[0] < values[-1]


def check_shards(group, implementation, bounds):
    lo, hi = bounds[group.rank()], bounds[group.rank() + 1]
    hidden, weight, _, rows = case()
    part = weight.detach()[lo:hi].clone().requires_grad_()
    values = []
    for objective in ("forward_kl", "reverse_kl", "alpha_beta"):
        exact_N = plain(hidden, weight, rows, objective)
        exact = torch.autograd.grad(exact_N.mean(), (hidden, weight))
        with launch.use(implementation):
            loss_N = fused_linear_topk_kl(hidden, part, rows, objective=objective, vocab_start=lo, tp_group=group, **OPTIONS)
            grads = torch.autograd.grad(loss_N.mean(), (hidden, part))
        assert error(loss_N.detach(), exact_N.detach()) <= 1e-12
        assert error(grads[0], exact[0]) <= 1e-12
        assert (grads[1] - exact[1][lo:hi]).norm() <= 1e-12 * exact[1].norm()
        values.append(loss_N.tolist())
    return values


@implementations
@pytest.mark.parametrize("bounds", [[0, 30, V], [0, 59, V], [0, V, V]], ids=["two ranks", "a rank of padding", "an empty rank"])
def test_it_is_the_same_on_every_split_of_the_vocabulary(bounds, implementation):
    first, second = on_ranks(2, check_shards, implementation, bounds)
    assert first == second


@implementations
def test_float32_keeps_the_digits_of_a_small_rest_and_of_logits_of_30000(implementation):
    hidden, weight, _, rows = case(dtype=torch.float32)
    weight = (weight.detach() + 1e3 * torch.eye(V, H)).requires_grad_()
    hidden = (30 * hidden.detach()).requires_grad_()
    with launch.use(implementation):
        loss_N = fused_linear_topk_kl(hidden, weight, rows, objective="forward_kl", **OPTIONS)
        grads = torch.autograd.grad(loss_N.mean(), (hidden, weight))
    z = (hidden @ weight.t()).double()[:, :REAL]
    log_q = torch.log_softmax(z, -1)
    buckets = torch.cat([log_q.gather(1, rows.ids_NK), log_q.scatter(1, rows.ids_NK, -torch.inf).logsumexp(-1, keepdim=True)], -1)
    log_p = torch.cat([rows.log_probs_NK, rows.log_rest_N[:, None]], -1)
    assert error(loss_N.detach(), (log_p.exp() * (log_p - buckets)).sum(-1).detach()) <= 2e-5
    assert all(x.isfinite().all() for x in grads)


def test_the_weight_gradient_is_added_to_main_grad():
    hidden, weight, _, rows = case(dtype=torch.bfloat16)
    expected = torch.autograd.grad(fused_linear_topk_kl(hidden, weight, rows, **OPTIONS).sum(), weight)[0]
    weight = torch.nn.Parameter(weight.detach())
    weight.main_grad = torch.ones(V, H)
    fused_linear_topk_kl(hidden, weight, rows, accumulate_into_main_grad=True, **OPTIONS).sum().backward()
    torch.testing.assert_close(weight.main_grad - 1, expected.float(), rtol=2**-7, atol=1e-5)


@implementations
def test_rows_and_settings_that_would_be_wrong_are_refused(implementation):
    hidden, weight, _, rows = case()
    twice, outside = rows.ids_NK.clone(), rows.ids_NK.clone()
    twice[3, 0], outside[2, 1] = twice[3, 5], REAL
    cases = [
        (TopKRows(twice, rows.log_probs_NK, rows.log_rest_N), {}, "the same id twice"),
        (TopKRows(outside, rows.log_probs_NK, rows.log_rest_N), {}, "an id outside the vocabulary of 57 tokens"),
        (rows[:5], {}, r"TopKRows has ids \(5, 6\), log_probs \(5, 6\) and log_rest \(5,\) for 12 rows"),
        (TopKRows(rows.ids_NK.double(), rows.log_probs_NK, rows.log_rest_N), {}, "give token ids as integers"),
        (rows, {"temperature": 2.0}, r"temperature=2\.0 needs the teacher's whole distribution.*use temperature=1"),
        (rows, {"objective": "kl"}, "use one of reverse_kl"),
    ]
    for wrong, options, message in cases:
        with launch.use(implementation), pytest.raises(ValueError, match=message):
            fused_linear_topk_kl(hidden, weight, wrong, **OPTIONS, **options)


def biases(k, implementation, scale=1.0, start=None, part=slice(None), group=None, with_minimum=True):
    """By direction: the true gaps of KL, and their bounds."""
    hidden, weight, log_p, rows = case(k)
    rows = TopKRows(rows.ids_NK, rows.log_probs_NK, rows.log_rest_N, log_p.amin(-1) if with_minimum else None)
    hidden = scale * hidden.detach()
    log_q = torch.log_softmax((hidden @ weight.t())[:, :REAL], -1)
    with launch.use(implementation):
        found = {objective: fused_linear_topk_kl_with_bias(hidden, weight[part].detach(), rows, objective=objective, vocab_start=start,
                                                           tp_group=group, **OPTIONS) for objective in ("forward_kl", "reverse_kl")}
    whole = {"forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1), "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1)}
    return {name: (whole[name] - found[name][0], found["forward_kl"][1 + i]) for i, name in enumerate(whole)}


@implementations
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("k", [1, K, 40, REAL - 1, REAL])
def test_what_is_cut_off_is_bounded_in_both_directions(k, scale, implementation):
    for gap_N, bound_N in biases(k, implementation, scale).values():
        assert (gap_N >= -1e-12).all() and (gap_N <= bound_N + 1e-12).all()
        assert k < REAL or bound_N.abs().max() <= 1e-12, "nothing is cut off"


@implementations
def test_the_bound_is_reached_where_the_formula_is_an_equality(implementation):
    """Two tokens in the rest, of which each model has nearly only one, and not the same."""
    log_p = torch.tensor([[0.6, 0.4 - 1e-9, 1e-9]], dtype=torch.float64).log()
    weight = torch.tensor([[0.5, 1e-9, 0.5 - 1e-9]], dtype=torch.float64).log().t()
    rows = TopKRows(torch.tensor([[0]]), log_p[:, :1], log_p[:, 1:].logsumexp(-1), log_p.amin(-1))
    with launch.use(implementation):
        loss, forward, _ = fused_linear_topk_kl_with_bias(torch.ones(1, 1, dtype=torch.float64), weight, rows)
    gap = (log_p.exp() * (log_p - weight.t())).sum() - loss
    assert 0 <= forward - gap <= 1e-6 and forward > 7


@implementations
def test_without_the_least_probability_the_reverse_bound_is_infinite(implementation):
    forward, reverse = (bound_N for _, bound_N in biases(K, implementation, with_minimum=False).values())
    assert (reverse > 1e20).all() and reverse.isfinite().all() and (forward < 100).all()


def check_biases(group, implementation):
    bounds = [0, 30, V]
    part = slice(*bounds[group.rank() : group.rank() + 2])
    found = biases(K, implementation, start=bounds[group.rank()], part=part, group=group)
    return {name: bound_N.tolist() for name, (_, bound_N) in found.items()}


@implementations
def test_the_bounds_are_the_same_on_every_split(implementation):
    alone = {name: bound_N.tolist() for name, (_, bound_N) in biases(K, implementation).items()}
    for found in on_ranks(2, check_biases, implementation):
        assert found == {name: pytest.approx(bound, rel=1e-12) for name, bound in alone.items()}


@implementations
@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd", "alpha_beta"])
def test_a_teacher_given_by_its_logits_is_the_same_to_the_bit(objective, implementation):
    hidden, weight, _, _ = case(dtype=torch.float32)
    teacher_hidden, teacher_weight = torch.randn(N, 5), torch.randn(V, 5)
    options = {**OPTIONS, "objective": objective}
    found = []
    with launch.use(implementation):
        logits = torch.cat([part @ teacher_weight.t() for part in teacher_hidden.split(OPTIONS["chunk_rows"])])
        for teacher in ((teacher_hidden, teacher_weight), (logits, None)):
            loss_N = fused_linear_kl(hidden, weight, *teacher, **options)
            found.append([loss_N.detach(), *torch.autograd.grad(loss_N.sum(), (hidden, weight))])
    if implementation == "reference":
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found))
    else:
        assert all(torch.equal(a, b) for a, b in zip(*found))
