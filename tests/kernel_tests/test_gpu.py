"""On a GPU: the compiled kernels at the sizes of real vocabularies, and the memory they take beyond their inputs."""

from __future__ import annotations

import pytest
import torch
from cases import error
from megakd_kernels import OBJECTIVES, cross_entropy, fused_linear_kl, kl_div, launch, promptkd_loss, reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VOCABULARIES = [32000, 50257, 50304, 128256, 151936]


def close_models(columns: int, rows: int = 64, dtype=torch.bfloat16) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda: torch.randn(rows, columns, generator=generator, device="cuda")
    s = 4 * draw()
    return [s.to(dtype), (s + draw()).to(dtype), (s + 0.1 * draw()).to(dtype)]


def gradient(fn, x, *others, **options):
    x = x.detach().clone().requires_grad_()
    loss = fn(x, *others, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.sum().backward()
    return loss.detach().double(), x.grad.double()


@pytest.mark.parametrize("columns", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_loss_equals_float64(columns, dtype):
    s, t, b = close_models(columns, dtype=dtype)
    labels = torch.arange(len(s), device="cuda") * 37
    cases = [(kl_div, reference.kl_div, (s, t), {"objective": objective}) for objective in OBJECTIVES]
    cases += [(promptkd_loss, reference.promptkd_loss, (t, s, b), {"base_coef": 0.7}),
              (cross_entropy, reference.cross_entropy, (s, labels), {})]
    for ours, plain, inputs, options in cases:
        exact = gradient(plain, *(x.double() if x.is_floating_point() else x for x in inputs), **options)
        same = gradient(plain, *inputs, **options)
        with launch.use("triton"):
            got = gradient(ours, *inputs, **options)
        for a, b_, c in zip(got, exact, same):
            limit = 2e-5 if dtype == torch.float32 else 2 * error(c, b_.cpu()) + 1e-7
            assert error(a, b_.cpu()) <= max(limit, 2e-5), (ours.__name__, options)


def peak_beyond(fn) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_in_place_takes_less_than_a_hundredth_of_the_logits():
    s, t, b = close_models(128256, rows=1024)
    s.requires_grad_()
    z = s * 1
    run = lambda: torch.autograd.grad(kl_div(z, t, inplace=True).sum(), z)
    assert peak_beyond(run) <= 0.01 * z.nbytes
    z = s * 1
    run = lambda: torch.autograd.grad(promptkd_loss(z, t, b, base_coef=0.7, inplace=True)[0].sum(), z)
    assert peak_beyond(run) <= 0.01 * z.nbytes


def test_the_fused_head_takes_one_chunk():
    N, V, H, chunk = 4096, 50257, 768, 1024
    hs, ht = (torch.randn(N, H, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    Ws, Wt = (torch.randn(V, H, device="cuda", dtype=torch.bfloat16) / 28 for _ in range(2))
    hs.requires_grad_(), Ws.requires_grad_()
    results = 4 * V * H + 2 * V * H + 4 * N * H  # the float32 sum and the gradients that are handed back
    run = lambda: fused_linear_kl(hs, Ws, ht, Wt, chunk_rows=chunk).sum().backward()
    assert peak_beyond(run) <= results + 1.1 * 2 * (chunk * V * 2)  # both models' logits of one chunk


def test_nothing_waits_for_the_host():
    s, t, _ = close_models(32000)
    s.requires_grad_()
    kl_div(s, t, weights=torch.ones(64, device="cuda")).sum().backward()  # compiled before
    torch.cuda.set_sync_debug_mode("error")
    try:
        kl_div(s, t, weights=torch.ones(64, device="cuda")).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
