"""The prompt loss equals two divergences in float64, and keeps its gradient where the prompt changes little."""

from __future__ import annotations

import pytest
import torch
from cases import NAN_ROW, WEIGHTS, assert_close, device_of, dtypes, error, implementations, logits, upstream, yardstick
from megakd_kernels import fused_linear_promptkd_loss, kl_div, launch, promptkd_loss, reference

pytestmark = pytest.mark.usefixtures("small_tiles")


def run(fn, t, *others, **options):
    """(loss, kd, base, dt)"""
    t = t.detach().clone().requires_grad_()
    outputs = fn(t, *others, **options)
    (outputs[0] * upstream().to(outputs[0])).sum().backward()
    assert not outputs[1].requires_grad and not outputs[2].requires_grad
    return *(x.detach() for x in outputs), t.grad


def test_the_reference_is_two_divergences():
    t, s, b = logits(3, dtype=torch.float64)
    t_ = t.clone().requires_grad_()
    kl = lambda x, y: (torch.log_softmax(x, -1).exp() * (torch.log_softmax(x, -1) - torch.log_softmax(y, -1))).sum(-1)
    exact = kl(t_, s) + 0.7 * kl(t_, b)
    (exact * upstream()).sum().backward()
    loss_N, kd_N, base_N, dt = run(reference.promptkd_loss, t, s, b, base_coef=0.7)
    for a, b in ((loss_N, exact.detach()), (kd_N + 0.7 * base_N, exact.detach()), (dt, t_.grad)):
        assert error(a, b) <= 1e-12


@dtypes
@implementations
@pytest.mark.parametrize("base", ["logits", "difference", "none"])
def test_value_and_gradient_equal_float64(base, implementation, dtype):
    t, s, b = (x.to(device_of(implementation)) for x in logits(3, dtype=dtype))
    third = {"logits": {"base_logits": b}, "difference": {"base_delta": t - b}, "none": {}}[base]
    options = {"base_coef": torch.tensor(0.7), "temperature": 1.5, "valid_vocab": 401}
    on_cpu = lambda dtype: {name: x.to("cpu", dtype) for name, x in third.items()}
    exact = run(reference.promptkd_loss, t.cpu().double(), s.cpu().double(), weights=WEIGHTS.double(), **options,
                **on_cpu(torch.float64))
    same_dtype = run(reference.promptkd_loss, t.cpu(), s.cpu(), weights=WEIGHTS, **options, **on_cpu(dtype))
    t[NAN_ROW] = torch.nan
    options["base_coef"] = options["base_coef"].to(t.device)
    with launch.use(implementation):
        ours = run(promptkd_loss, t, s, weights=WEIGHTS.to(t.device), **options, **third)
    for a, b, c in zip(ours, exact, same_dtype):
        assert_close(a.cpu(), b, yardstick(c, implementation))
    assert not ours[3][NAN_ROW].any() and not ours[3][:, 401:].any()


@implementations
def test_without_a_base_it_is_the_forward_divergence_of_the_prompt(implementation):
    t, s = (x.to(device_of(implementation)) for x in logits(2))
    with launch.use(implementation):
        loss_N, kd_N, base_N = promptkd_loss(t, s, base_coef=0.7)
        torch.testing.assert_close(loss_N, kl_div(s, t, objective="forward_kl"))
    assert torch.equal(loss_N, kd_N) and not base_N.any()


def test_in_place_writes_over_the_prompted_logits_only():
    t, s, b = logits(3)
    expected = run(promptkd_loss, t, s, b, base_coef=0.7)[3]
    leaf = t.clone().requires_grad_()
    kept, address = s.clone(), None
    prompted = leaf * 1
    address = prompted.data_ptr()
    loss_N, _, _ = promptkd_loss(prompted, s, b, base_coef=0.7, inplace=True)
    (grad,) = torch.autograd.grad((loss_N * upstream().to(loss_N)).sum(), prompted)
    assert grad.data_ptr() == address and torch.equal(grad, expected) and torch.equal(s, kept)


def close_teachers(prompt_effect: float):
    """bfloat16 hidden states of a teacher with and without its prompt, and their head."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    hb, W = draw(16, 256), 3 * draw(4000, 256) / 16
    return (hb + prompt_effect * draw(16, 256)).bfloat16(), hb.bfloat16(), W.bfloat16()


def test_the_difference_form_keeps_the_gradient_of_a_small_prompt_effect_in_bfloat16():
    ht, hb, W = close_teachers(0.03)
    exact, from_logits, fused = ht.double().requires_grad_(), ht.clone().requires_grad_(), ht.clone().requires_grad_()
    exact_N = kl_div(exact @ W.double().t(), hb.double() @ W.double().t())
    exact_N.sum().backward()
    assert 2e-3 < exact_N.mean() < 8e-3
    kl_div(from_logits @ W.t(), hb @ W.t()).sum().backward()
    assert error(from_logits.grad, exact.grad) > 0.1  # what bfloat16 logits leave of it
    loss_N, kd_N, base_N = fused_linear_promptkd_loss(fused, W, hb, ht, W, base_coef=1.0)  # the student is the prompted teacher
    loss_N.sum().backward()
    assert kd_N.abs().max() <= 1e-6
    assert error(base_N, exact_N.detach()) <= 0.02
    assert error(fused.grad, exact.grad) <= 0.02


def test_the_base_is_given_once():
    t, s, b = logits(3)
    with pytest.raises(ValueError, match="base_logits or base_delta, not both"):
        promptkd_loss(t, s, b, base_coef=1.0, base_delta=t - b)
