"""Hidden states to loss: chunked equals whole, no tensor of the logits' size exists, and frozen heads cost nothing."""

from __future__ import annotations

import pytest
import torch
from cases import INTERPRETED, assert_close, error
from megakd_kernels import fused_linear_cross_entropy, fused_linear_kl, fused_linear_promptkd_loss, launch, reference
from torch.utils._python_dispatch import TorchDispatchMode

N, V, HS, HT = 40, 203, 8, 12


def models(dtype=torch.float32, rows=N):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return draw(rows, HS), draw(V, HS), draw(rows, HT), draw(V, HT)


class Watch(TorchDispatchMode):
    """Bytes of the largest tensor that an operation returned, of the largest that it made, and the matrix products' shapes."""

    def __init__(self):
        super().__init__()
        self.largest, self.largest_new, self.products = 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
                if x.untyped_storage().data_ptr() not in given:
                    self.largest_new = max(self.largest_new, x.untyped_storage().nbytes())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("chunk_rows", [1, 7, 40, 1000])
@pytest.mark.parametrize("masked", [0.0, 0.5, 1.0])
def test_any_chunk_size_and_mask_gives_the_same(chunk_rows, masked):
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1)) * (torch.arange(N) >= masked * N)
    tensors, exact_tensors = models(), models(torch.float64)
    ours = fused_linear_kl(*tensors, weights=weights, chunk_rows=chunk_rows)
    exact = reference.fused_linear_kl(*exact_tensors, weights=weights.double())
    assert_close(ours, exact.detach())
    for a, b in zip(torch.autograd.grad(0.3 * ours.sum(), tensors), torch.autograd.grad(0.3 * exact.sum(), exact_tensors)):
        assert_close(a, b)


def test_bfloat16_is_no_worse_than_twice_torch():
    tensors, plain, exact = models(torch.bfloat16), models(torch.bfloat16), models(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in exact]
    grads = [torch.autograd.grad(fn(*x).sum(), x) for fn, x in (
        (fused_linear_kl, tensors), (reference.fused_linear_kl, plain), (reference.fused_linear_kl, exact))]
    for ours, torchs, truth in zip(*grads):
        assert error(ours, truth) <= 2 * error(torchs, truth) + 1e-7


def test_nothing_of_the_logits_size_is_made():
    tensors = models(rows=2000)
    with Watch() as watch:
        fused_linear_kl(*tensors, chunk_rows=50).sum().backward()
    assert watch.largest <= 4 * max(50 * V, 2000 * HT, V * HT)  # a chunk of logits, the hidden states, a head


def test_a_frozen_head_gets_no_product():
    hs, Ws, ht, Wt = models()
    with Watch() as watch:
        fused_linear_kl(hs, Ws.detach(), ht.detach(), Wt.detach(), chunk_rows=N).sum().backward()
    assert sorted(watch.products) == sorted([(N, V), (N, V), (N, HS)])
    with Watch() as watch, torch.no_grad():
        fused_linear_kl(hs, Ws, ht, Wt, chunk_rows=N)
    assert watch.products == [(N, V), (N, V)]


def test_the_hidden_gradient_alone_takes_any_upstream_gradient():
    upstream = torch.rand(N, generator=torch.Generator().manual_seed(2))
    (hs, Ws, ht, Wt), (hs64, *others64) = models(), models(torch.float64)
    (fused_linear_kl(hs, Ws.detach(), ht.detach(), Wt.detach()) * upstream).sum().backward()
    (reference.fused_linear_kl(hs64, *(x.detach() for x in others64)) * upstream.double()).sum().backward()
    assert_close(hs.grad, hs64.grad)


def test_a_weight_gradient_refuses_an_upstream_gradient_of_many_values():
    tensors = models()
    with pytest.raises(ValueError, match="pass per-token factors as weights="):
        (fused_linear_kl(*tensors) * torch.rand(N)).sum().backward()
    mask = (torch.arange(N) < 20).float()
    (fused_linear_kl(*tensors, weights=mask) * mask).sum().backward()  # zeros where nothing counts are not another value


def test_a_second_backward_gives_the_same():
    tensors = models()
    loss = fused_linear_kl(*tensors).sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, tensors)))


@pytest.mark.parametrize("megatron", [False, True])
def test_the_weight_gradient_is_added_to_main_grad(megatron):
    tensors = models(torch.bfloat16)
    expected = torch.autograd.grad(0.5 * fused_linear_kl(*tensors).sum(), tensors[1])[0]
    Ws = torch.nn.Parameter(tensors[1].detach())
    with pytest.raises(ValueError, match=r"needs weight\.main_grad"):
        fused_linear_kl(tensors[0], Ws, *(x.detach() for x in tensors[2:]), accumulate_into_main_grad=True)
    Ws.main_grad = torch.ones(V, HS)
    if megatron:
        Ws.grad_added_to_main_grad = False
    loss = fused_linear_kl(tensors[0], Ws, *(x.detach() for x in tensors[2:]), accumulate_into_main_grad=True)
    (0.5 * loss).sum().backward()
    torch.testing.assert_close(Ws.main_grad - 1, expected.float(), rtol=2**-7, atol=1e-5)
    if megatron:
        assert Ws.grad_added_to_main_grad and Ws.grad is not None  # the hook of Megatron's data parallelism fires on it
    else:
        assert Ws.grad is None


def test_cross_entropy_and_prompt_loss_equal_their_references():
    hs, Ws, ht, Wt = models()
    exact = [x.detach().double().requires_grad_() for x in (hs, Ws, ht, Wt)]
    labels = torch.arange(N) % V
    ours = torch.autograd.grad(fused_linear_cross_entropy(hs, Ws, labels, chunk_rows=7).mean(), (hs, Ws))
    truth = torch.autograd.grad(reference.fused_linear_cross_entropy(exact[0], exact[1], labels).mean(), exact[:2])
    for a, b in zip(ours, truth):
        assert_close(a, b)
    base = ht.detach() + 0.1
    parts = fused_linear_promptkd_loss(ht, Wt, base, hs, Ws, base_coef=0.7, chunk_rows=7)
    exact_parts = reference.fused_linear_promptkd_loss(exact[2], exact[3], base.double(), exact[0], exact[1], base_coef=0.7)
    for a, b in zip(parts, exact_parts):
        assert_close(a.detach(), b.detach())
    assert_close(*(torch.autograd.grad(x[0].sum(), h)[0] for x, h in ((parts, ht), (exact_parts, exact[2]))))


@pytest.mark.skipif(not INTERPRETED, reason="tensors of the CPU go to Triton only interpreted; test_gpu.py has its own")
def test_heads_and_triton_kernels_together(small_tiles):
    (hs, Ws, ht, Wt), exact = models(), models(torch.float64)
    weights = torch.rand(N, generator=torch.Generator().manual_seed(1)) * (torch.arange(N) % 3 > 0)
    options = {"valid_vocab": 200, "temperature": 1.5}
    with launch.use("triton"):
        ours = fused_linear_kl(hs, Ws, ht, Wt, weights=weights, chunk_rows=16, **options)
        parts = fused_linear_promptkd_loss(ht, Wt, ht.detach() + 0.1, hs, Ws, base_coef=0.7, chunk_rows=16, **options)
        grads = torch.autograd.grad(0.3 * ours.sum(), (hs, Ws, ht, Wt)) + torch.autograd.grad(parts[0].sum(), ht)
    plain = reference.fused_linear_kl(*exact, weights=weights.double(), **options)
    exact_parts = reference.fused_linear_promptkd_loss(exact[2], exact[3], exact[2].detach() + 0.1, exact[0], exact[1],
                                                       base_coef=0.7, **options)
    exact_grads = torch.autograd.grad(0.3 * plain.sum(), exact) + torch.autograd.grad(exact_parts[0].sum(), exact[2])
    for a, b in zip((ours, *parts, *grads), (plain, *exact_parts, *exact_grads)):
        assert_close(a.detach(), b.detach())


def test_no_rows_at_all():
    tensors = models(rows=0)
    loss = fused_linear_kl(*tensors)
    loss.sum().backward()
    assert loss.shape == (0,) and not tensors[1].grad.any()
