"""One launch draws what the sampler's forty draw."""

from __future__ import annotations

import pytest
import torch
from megakd_kernels import VocabShard, launch

from megakd.generation.sampling import NO_TOKEN, Sampler, Sampling, argmax, gumbel, noise_streams

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from megakd_kernels.gumbel import triton as kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS, FIRST, ROWS = 603, 300, 8


@pytest.fixture
def drawn(monkeypatch):
    """The kernel, a vocabulary in several splits of several tiles."""
    monkeypatch.setattr(kernel, "SPLIT_COLUMNS", 256)
    monkeypatch.setattr(kernel, "BLOCK", 128)
    return lambda logits, position, temperature=1.0: kernel.draw(
        logits, streams(), torch.tensor(position, device=DEVICE), temperature, COLUMNS, FIRST, NO_TOKEN
    )


def streams() -> torch.Tensor:
    return noise_streams(1234, list(range(ROWS)), torch.device(DEVICE))


def logits(dtype=torch.float32) -> torch.Tensor:
    """A row wider than what counts, whose padding would win."""
    padded = torch.randn(ROWS, COLUMNS + 21, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype)
    padded[:, COLUMNS:] = 100.0
    return padded


def by_torch(z, position: int, temperature: float = 1.0):
    tokens = torch.arange(FIRST, FIRST + COLUMNS, dtype=torch.int32, device=DEVICE)
    scores = z[:, :COLUMNS].float() / temperature + gumbel(streams(), torch.tensor(position, device=DEVICE), tokens)
    return scores.amax(-1), argmax(scores, VocabShard(vocab_start=FIRST))


@pytest.mark.parametrize("dtype, temperature", [(torch.float32, 1.0), (torch.bfloat16, 0.7)])
def test_the_same_tokens_are_drawn(drawn, dtype, temperature):
    z = logits(dtype)
    for position in (0, 1, 255):
        score, token = drawn(z, position, temperature)
        want_score, want_token = by_torch(z, position, temperature)
        assert torch.equal(token, want_token)
        torch.testing.assert_close(score, want_score, rtol=1e-5, atol=1e-5)


@triton.jit
def log1p_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, kernel.log1p(tl.load(x_ptr + at, mask=at < count, other=0.5)), mask=at < count)


def test_the_smallest_and_the_largest_noise_are_as_exact():
    """Where 1 - u rounds to 1: a plain logarithm would give an infinity there, or steps."""
    x = -torch.tensor([2.0**-32, 3 * 2.0**-32, 2.0**-25, 2.0**-24, 1e-4, 0.3, 1 - 2.0**-24], device=DEVICE)
    out = torch.empty_like(x)
    log1p_kernel[(1,)](x, out, len(x), BLOCK=8)
    torch.testing.assert_close(out.double(), torch.log1p(x.double()), rtol=3e-7, atol=0)


def test_of_equals_the_first_wins_and_no_number_is_no_token(drawn):
    z = torch.full((ROWS, COLUMNS), -torch.inf, device=DEVICE)
    assert drawn(z, 0)[1].tolist() == [FIRST] * ROWS  # as torch's argmax
    z = logits()[:, :COLUMNS].contiguous()
    z[3, 500], z[5, 2], z[7, 9] = torch.nan, torch.inf, -torch.inf
    score, token = drawn(z, 4)
    _, want = by_torch(z, 4)
    assert torch.equal(token, want) and token[3] == token[5] == NO_TOKEN != token[7]
    assert score[3].isinf() and score[5].isinf()


@pytest.mark.parametrize("setting, launches", [({}, 1), ({"temperature": 0.6}, 1), ({"greedy": True}, 0), ({"top_k": 5}, 0), ({"repetition_penalty": 1.2}, 0)])
def test_the_sampler_draws_so_where_no_whole_row_has_to_be_seen(monkeypatch, setting, launches):
    z, position, called = logits(), torch.tensor(7, device=DEVICE), []
    sampler = Sampler(Sampling(**setting), VocabShard(COLUMNS), [1.0], z.shape[1], torch.device(DEVICE))
    seen = torch.zeros(ROWS, 3, dtype=torch.int64, device=DEVICE)
    with launch.use("reference"):
        want = sampler([z.clone()], streams(), position, seen)
    draw = kernel.draw
    monkeypatch.setattr(kernel, "draw", lambda *args, **options: called.append(1) or draw(*args, **options))
    with launch.use("triton"):
        assert torch.equal(sampler([z.clone()], streams(), position, seen), want)
    assert len(called) == launches
