"""Every operator gives the same on every split of the vocabulary: values, gradients, and one loss for all ranks, bit for bit."""

from __future__ import annotations

import megakd_kernels as mk
import pytest
import torch
from cases import WEIGHTS, assert_close, device_of, error, logits, upstream
from megakd_kernels import OBJECTIVES, launch, reference
from ranks import on_ranks

COLUMNS = 203
SPLITS = {  # where ranks begin and end
    "one rank": [0, COLUMNS],
    "two equal ranks but for one column": [0, 102, COLUMNS],
    "three uneven ranks": [0, 41, 170, COLUMNS],
    "an empty shard": [0, 120, 120, COLUMNS],
    "a shard of padding only": [0, 90, 200, COLUMNS],
}
splits = pytest.mark.parametrize("split", SPLITS)


def backward(outputs, grad_N, *inputs):
    loss_N = outputs[0] if isinstance(outputs, tuple) else outputs
    grads = torch.autograd.grad((loss_N * grad_N.to(loss_N)).sum(), inputs)
    return [x.detach() for x in (outputs if isinstance(outputs, tuple) else (outputs,))], grads


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


def losses_from_logits(group, implementation, lo, hi, dtype):
    """{name: (values, gradients)} of all operators on columns lo..hi."""
    device = device_of(implementation)
    s, t, b = (x.to(device, dtype)[:, lo:hi] for x in logits(3, COLUMNS))
    options = {"valid_vocab": 199, "vocab_start": lo, "tp_group": group, "weights": WEIGHTS.to(device, dtype)}
    grad_N, results = upstream().to(device), {}
    with launch.use(implementation):
        for objective in OBJECTIVES:
            s_, t_ = leaves(s, t)
            results[objective] = backward(mk.kl_div(s_, t_, objective=objective, **options), grad_N, s_, t_)
        (t_,) = leaves(t)
        results["promptkd"] = backward(mk.promptkd_loss(t_, s, b, base_coef=0.7, **options), grad_N, t_)
        (s_,) = leaves(s)
        labels = torch.tensor([3, -100, 100, 198, 0], device=device)
        results["cross_entropy"] = backward(mk.cross_entropy(s_, labels, **options), grad_N, s_)
    return {name: [[x.cpu() for x in part] for part in parts] for name, parts in results.items()}


def check_logits(group, implementation, bounds):
    lo, hi = bounds[group.rank()], bounds[group.rank() + 1]
    ours = losses_from_logits(group, implementation, lo, hi, torch.float32)
    exact = losses_from_logits(None, "reference", 0, COLUMNS, torch.float64)
    for name, (values, grads) in exact.items():
        for a, b in zip(ours[name][0], values):
            assert_close(a, b)
        for a, b in zip(ours[name][1], grads):
            assert ((a - b[:, lo:hi]).norm() <= 2e-5 * b.norm()), name
    return {name: [x.tolist() for x in values] for name, (values, _) in ours.items()}


@pytest.mark.parametrize(("implementation", "split"), [(i, s) for i in ("rows", "reference") for s in SPLITS] + [
    ("triton", "three uneven ranks"), ("triton", "an empty shard")])  # two: the interpreter takes seconds
def test_losses_from_logits(implementation, split, small_tiles):
    bounds = SPLITS[split]
    ranks = on_ranks(len(bounds) - 1, check_logits, implementation, bounds)
    assert all(rank == ranks[0] for rank in ranks)


def losses_from_hidden(group, implementation, lo, hi, dtype, **chunks):
    generator = torch.Generator().manual_seed(0)
    device = device_of(implementation)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)
    hs, ht, hb, Ws, Wt = draw(5, 8), draw(5, 12), draw(5, 12), draw(COLUMNS, 8)[lo:hi], draw(COLUMNS, 12)[lo:hi]
    options = {"valid_vocab": 199, "vocab_start": lo, "tp_group": group, "weights": WEIGHTS.to(device, dtype), **chunks}
    same = torch.full((5,), 0.25, device=device)  # a weight's gradient takes one upstream gradient
    results = {}
    with launch.use(implementation):
        for objective in OBJECTIVES:
            four = leaves(hs, Ws, ht, Wt)
            results[objective] = backward(mk.fused_linear_kl(*four, objective=objective, **options), same, *four)
        (ht_,) = leaves(ht)
        results["promptkd"] = backward(
            mk.fused_linear_promptkd_loss(ht_, Wt, hb, hs, Ws, base_coef=0.7, **options), upstream().to(device), ht_)
        two = leaves(hs, Ws)
        results["cross_entropy"] = backward(
            mk.fused_linear_cross_entropy(*two, torch.tensor([3, -100, 100, 198, 0], device=device), **options), same, *two)
    return {name: [[x.cpu() for x in part] for part in parts] for name, parts in results.items()}


def check_hidden(group, implementation, bounds):
    lo, hi = bounds[group.rank()], bounds[group.rank() + 1]
    ours = losses_from_hidden(group, implementation, lo, hi, torch.float32, chunk_rows=2)
    exact = losses_from_hidden(None, "reference", 0, COLUMNS, torch.float64)
    for name, (values, grads) in exact.items():
        for a, b in zip(ours[name][0], values):
            assert_close(a, b)
        for i, (a, b) in enumerate(zip(ours[name][1], grads)):
            if i % 2:  # a weight: this shard's rows
                assert (a - b[lo:hi]).norm() <= 2e-5 * b.norm(), name
            else:      # hidden states: the whole gradient, on every rank
                assert error(a, b) <= 2e-5, name


@splits
@pytest.mark.parametrize("implementation", ["rows", "reference", pytest.param("triton", marks=pytest.mark.gpu)])
def test_losses_from_hidden_states(split, implementation):
    if implementation == "triton" and not torch.cuda.is_available():
        pytest.skip("interpreted, this takes minutes")
    bounds = SPLITS[split]
    on_ranks(len(bounds) - 1, check_hidden, implementation, bounds)


def check_default_start(group, implementation):
    """Equal shards need no vocab_start."""
    s, t = logits(2, 200)
    lo = 100 * group.rank()
    with launch.use(implementation):
        ours = mk.kl_div(s[:, lo : lo + 100], t[:, lo : lo + 100], valid_vocab=177, tp_group=group)
    assert_close(ours, reference.kl_div(s.double()[:, :177], t.double()[:, :177]))


def test_equal_shards_need_no_vocab_start():
    on_ranks(2, check_default_start, "rows")


def count_collectives(group, objective):
    import torch.distributed as dist

    calls = []
    for name in ("all_reduce", "all_gather_single", "all_gather_into_tensor"):
        if hasattr(dist, name):
            original = getattr(dist, name)
            setattr(dist, name, lambda *args, name=name, original=original, **kw: (calls.append(name), original(*args, **kw))[1])
    s, t = leaves(*logits(2, 200))
    mk.kl_div(s, t, objective=objective, vocab_start=200 * group.rank(), tp_group=group).sum().backward()
    return len(calls)


@pytest.mark.parametrize(("objective", "expected"), [("reverse_kl", 1), ("forward_kl", 1), ("jsd", 2), ("tvd", 2)])
def test_one_collective_a_loss_and_two_for_mixtures(objective, expected):
    assert on_ranks(2, count_collectives, objective) == [expected, expected]
