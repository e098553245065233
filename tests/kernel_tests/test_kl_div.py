"""The divergences equal their formulas in float64, in value and in both gradients, whatever the logits are."""

from __future__ import annotations

import math

import pytest
import torch
from cases import (
    NAN_ROW,
    WEIGHTS,
    assert_close,
    device_of,
    dtypes,
    error,
    implementations,
    logits,
    peak_bytes,
    upstream,
    yardstick,
)
from megakd_kernels import OBJECTIVES, kl_div, launch, reference, row_chunks

pytestmark = pytest.mark.usefixtures("small_tiles")


def plain(objective: str, s, t, T=1.0, beta=0.5, alpha=0.1):
    """The definitions in float64 torch on one rank, written independently of the package."""
    log_q, log_p = torch.log_softmax(s.double() / T, -1), torch.log_softmax(t.double() / T, -1)
    kl = lambda a, log_b: (a.exp() * (a - log_b)).sum(-1)
    mix = lambda share, a, b: (share * a.exp() + (1 - share) * b.exp()).log()
    s = alpha + beta
    ab = lambda a, b: (alpha / s * (s * a).exp() + beta / s * (s * b).exp() - (alpha * a + beta * b).exp()).sum(-1) / alpha / beta
    return {
        "reverse_kl": lambda: kl(log_q, log_p),
        "forward_kl": lambda: kl(log_p, log_q),
        "jsd": lambda: beta * kl(log_p, mix(beta, log_p, log_q)) + (1 - beta) * kl(log_q, mix(beta, log_p, log_q)),
        "skew_forward_kl": lambda: kl(log_p, mix(alpha, log_p, log_q)),
        "skew_reverse_kl": lambda: kl(log_q, mix(alpha, log_q, log_p)),
        "tvd": lambda: 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1),
        "alpha_beta": lambda: ab(log_p, log_q),
    }[objective]()


def run(fn, s, t, grad_N, **options):
    """(loss, ds, dt) of one call."""
    s, t = s.detach().clone().requires_grad_(), t.detach().clone().requires_grad_()
    loss_N = fn(s, t, **options)
    (loss_N * grad_N.to(loss_N)).sum().backward()
    return loss_N.detach(), s.grad, t.grad


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_reference_is_the_formula(objective):
    s, t = logits(2, dtype=torch.float64)
    exact = run(lambda s, t: plain(objective, s, t, T=1.7, beta=0.3, alpha=0.2), s, t, upstream())
    ours = run(reference.kl_div, s, t, upstream(), objective=objective, temperature=1.7, beta=0.3, alpha=0.2)
    for a, b in zip(ours, exact):
        assert error(a, b) <= 1e-12


@dtypes
@implementations
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_value_and_gradients_equal_float64(objective, implementation, dtype):
    s, t = (x.to(device_of(implementation)) for x in logits(2, dtype=dtype))
    options = {"objective": objective, "temperature": 2.0, "beta": 0.3, "alpha": 0.2, "valid_vocab": 401}
    exact = run(reference.kl_div, s.double().cpu(), t.double().cpu(), upstream(), weights=WEIGHTS.double(), **options)
    same_dtype = run(reference.kl_div, s.cpu(), t.cpu(), upstream(), weights=WEIGHTS, **options)
    s[NAN_ROW] = torch.nan
    with launch.use(implementation):
        ours = run(kl_div, s, t, upstream(), weights=WEIGHTS.to(s.device), **options)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for a, b, c in zip(ours, exact, same_dtype):
        assert_close(a.cpu(), b, yardstick(c, implementation))
    for grad in ours[1:]:
        assert not grad[NAN_ROW].any() and not grad[:, 401:].any()


@implementations
def test_logits_of_any_row_length_and_stride_are_read_right(implementation):
    for columns, stride in ((1, 1), (7, 8), (128, 128), (129, 136), (300, 307)):
        s, t = (x[:, :columns].to(device_of(implementation)) for x in logits(2, stride))
        with launch.use(implementation):
            ours = run(lambda s, t: kl_div(s, t), s, t, upstream())
        exact = run(lambda s, t: plain("reverse_kl", s, t), s.cpu(), t.cpu(), upstream())
        for a, b in zip(ours, exact):
            torch.testing.assert_close(a.double().cpu(), b.double(), rtol=2e-5, atol=5e-6)


@implementations
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equal_models_have_no_loss_and_no_gradient(objective, implementation):
    (s,) = logits(1)
    with launch.use(implementation):
        ours = run(kl_div, s.to(device_of(implementation)), s.to(device_of(implementation)), upstream(), objective=objective)
    for x in ours:
        assert x.abs().max() <= 1e-6


@implementations
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_disjoint_supports_at_logits_of_30000(objective, implementation):
    s, t = (torch.zeros(5, 300, device=device_of(implementation)) for _ in range(2))
    s[:, 7], t[:, 250] = 3e4, 3e4
    expected = {"reverse_kl": 3e4, "forward_kl": 3e4, "jsd": math.log(2), "skew_forward_kl": -math.log(0.1),
                "skew_reverse_kl": -math.log(0.1), "tvd": 1.0, "alpha_beta": 1 / (0.1 * 0.5)}[objective]
    with launch.use(implementation):
        loss_N, ds, dt = run(kl_div, s, t, upstream(), objective=objective)
    torch.testing.assert_close(loss_N.cpu(), torch.full((5,), expected), rtol=1e-5, atol=0)
    assert ds.isfinite().all() and dt.isfinite().all()


@implementations
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_columns_of_minus_infinity_count_for_nothing(objective, implementation):
    s, t = logits(2)
    exact = run(lambda s, t: plain(objective, s, t), s[:, :300], t[:, :300], upstream())
    s[:, 300:], t[:, 300:] = -torch.inf, -torch.inf
    with launch.use(implementation):
        ours = run(kl_div, s.to(device_of(implementation)), t.to(device_of(implementation)), upstream(), objective=objective)
    assert_close(ours[0].cpu(), exact[0])
    for a, b in zip(ours[1:], exact[1:]):
        assert_close(a[:, :300].cpu(), b.double())
        assert not a[:, 300:].any()


@implementations
def test_mass_where_the_other_model_has_none_is_huge_but_never_nan(implementation):
    s, t = (x.to(device_of(implementation)) for x in logits(2))
    t[:, :200] = -torch.inf
    with launch.use(implementation):
        assert (kl_div(s, t, objective="reverse_kl") > 1e20).all()
        loss_N, ds, dt = run(kl_div, s, t, upstream(), objective="forward_kl")
    log_p, log_q = torch.log_softmax(t.double().cpu(), -1), torch.log_softmax(s.double().cpu(), -1)
    assert_close(loss_N.cpu(), (log_p.exp() * (log_p - log_q)).nan_to_num(0.0).sum(-1))
    assert ds.isfinite().all() and dt.isfinite().all()


@pytest.mark.parametrize("implementation", ["rows", "triton"])
@pytest.mark.parametrize("objective", ["reverse_kl", "jsd", "skew_reverse_kl"])
def test_in_place_gradients_are_the_same_and_take_no_memory(objective, implementation):
    s, t = (x.to(device_of(implementation)) for x in logits(2))
    weights = WEIGHTS.to(s.device)
    with launch.use(implementation):
        _, ds, dt = run(kl_div, s, t, upstream(), objective=objective, weights=weights, valid_vocab=400)
        logits_s, logits_t = s.clone().requires_grad_(), t.clone().requires_grad_()
        a, b = logits_s * 1, logits_t * 1  # not leaves, as a model's logits
        address = a.data_ptr(), b.data_ptr()
        loss_N = kl_div(a, b, objective=objective, weights=weights, valid_vocab=400, inplace=True)
        grads = torch.autograd.grad((loss_N * upstream().to(loss_N)).sum(), (a, b), retain_graph=True)
    assert (grads[0].data_ptr(), grads[1].data_ptr()) == address
    assert torch.equal(grads[0], ds) and torch.equal(grads[1], dt)
    with pytest.raises(RuntimeError, match="inplace=False"):
        loss_N.sum().backward()


@implementations
def test_close_models_with_far_offsets_keep_their_digits(implementation):
    (s,) = logits(1, 1000)
    t = s + 0.02 * torch.randn(s.shape, generator=torch.Generator().manual_seed(1)) + 1000
    with launch.use(implementation):
        loss_N = kl_div(s.to(device_of(implementation)), t.to(device_of(implementation)))
    exact = plain("reverse_kl", s, t)
    assert exact.max() < 1e-3
    assert ((loss_N.double().cpu() - exact).abs() / exact).max() <= 0.02


def test_a_cpu_makes_nothing_of_the_logits_size(monkeypatch):
    from test_fused_linear_kl import Watch

    monkeypatch.setattr(row_chunks, "CHUNK_NUMBERS", 2000)
    for objective in ("reverse_kl", "jsd"):
        s, t = torch.randn(400, 500).requires_grad_(), torch.randn(400, 500)
        z = s * 1
        with Watch() as watch:
            loss_N = kl_div(z, t, objective=objective, inplace=True)
            torch.autograd.grad(loss_N.sum(), z)
        assert watch.largest == z.untyped_storage().nbytes()  # views of the logits themselves
        assert watch.largest_new <= 4 * 8 * 400
        with Watch() as watch:
            kl_div(s.detach(), t, objective=objective)
        assert watch.largest_new <= 4 * 8 * 400  # a chunk of float32, or eight statistics a row: 3 % of the logits here


def test_in_place_a_cpu_takes_less_than_a_hundredth_of_the_logits():
    row = torch.randn(128256, generator=torch.Generator().manual_seed(0)).bfloat16()
    z = torch.empty(4096, 128256, dtype=torch.bfloat16).copy_(row).requires_grad_()  # 1 GB
    teacher = (0.8 * row).expand(4096, -1)
    assert peak_bytes(lambda: kl_div(z, teacher, inplace=True).sum().backward()) <= 0.01 * z.nbytes
    one = row[None].clone().requires_grad_()
    kl_div(one, teacher[:1]).sum().backward()
    assert torch.equal(z.detach()[[0, -1]], one.grad.expand(2, -1))


def test_the_teacher_alone_may_learn():
    s, t = logits(2)
    t.requires_grad_()
    kl_div(s, t, objective="reverse_kl").sum().backward()
    exact = t.detach().double().requires_grad_()
    plain("reverse_kl", s, exact).sum().backward()
    assert_close(t.grad, exact.grad)


def test_models_of_different_padded_width_are_aligned_by_valid_vocab():
    s, t = logits(2)
    exact = plain("reverse_kl", s[:, :390], t[:, :390])
    assert_close(kl_div(s[:, :400], t[:, :392], valid_vocab=390), exact)
    with pytest.raises(ValueError, match="pad both to one width"):
        kl_div(s[:, :400], t[:, :392])
    with pytest.raises(ValueError, match="must not exceed the smaller vocabulary"):
        kl_div(s[:, :400], t[:, :392], valid_vocab=400)


@pytest.mark.parametrize(("options", "message"), [
    ({"objective": "kl"}, "use one of reverse_kl, forward_kl"),
    ({"objective": "jsd", "beta": 1.0}, "use forward_kl or reverse_kl"),
    ({"objective": "skew_forward_kl", "alpha": 0.0}, "use forward_kl for alpha = 0"),
    ({"temperature": 0.0}, "temperature=0.0 must be positive"),
])
def test_settings_without_a_formula_are_refused(options, message):
    s, t = logits(2)
    with pytest.raises(ValueError, match=message):
        kl_div(s, t, **options)


def test_weights_of_another_length_are_refused():
    s, t = logits(2)
    with pytest.raises(ValueError, match=r"weights has the shape \(3,\) for 5 rows: give one number a row"):
        kl_div(s, t, weights=torch.ones(3))


@implementations
def test_the_logits_stay_what_they_are_until_backward(implementation):
    s, t = (x.to(device_of(implementation)) for x in logits(2))
    exact = s.double().cpu().requires_grad_()
    sum(reference.kl_div(exact, t.double().cpu(), objective=o).sum() for o in ("forward_kl", "reverse_kl")).backward()
    leaf = s.clone().requires_grad_()
    z = leaf * 1
    with launch.use(implementation):
        first = kl_div(z, t, objective="forward_kl", inplace=True).sum()
        (first + kl_div(z, t, objective="reverse_kl").sum()).backward()  # this one's backward is the earlier
    assert_close(leaf.grad.cpu(), exact.grad)


@implementations
def test_a_row_that_nobody_wants_a_gradient_of_gets_none_whatever_it_holds(implementation):
    s, t = (x.to(device_of(implementation)) for x in logits(2))
    s[NAN_ROW] = torch.nan
    s.requires_grad_()
    keep = torch.arange(len(s), device=s.device) != NAN_ROW
    with launch.use(implementation):
        kl_div(s, t)[keep].sum().backward()
    assert s.grad.isfinite().all() and not s.grad[NAN_ROW].any() and s.grad[keep].any()


@pytest.mark.parametrize("implementation", ["rows", "compiled"])
def test_float64_keeps_its_digits(implementation):
    s, t = logits(2, dtype=torch.float64)
    with launch.use(implementation):
        assert error(kl_div(s, t), plain("reverse_kl", s, t)) <= 1e-13


@implementations
def test_weights_may_be_a_column_of_a_matrix(implementation):
    s, t = (x.to(device_of(implementation)) for x in logits(2))
    weights = WEIGHTS.to(s.device)
    column = torch.stack([weights, torch.full_like(weights, 9.0)], 1)[:, 0]
    with launch.use(implementation):
        assert torch.equal(kl_div(s, t, weights=column), kl_div(s, t, weights=weights))
