"""The embedding with a soft prompt is a lookup, a concatenation and a sum, exactly, on every split of the table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import device_of
from megakd_kernels import launch, prompt_embedding
from ranks import on_ranks

B, S, P, H, V = 2, 5, 3, 200, 64
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "rows", "triton"])


def inputs(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    tokens = torch.randint(0, V, (B, S), generator=generator)
    return [x.to(device) for x in (tokens, draw(V, H).to(dtype), draw(P, H), draw(32, H).to(dtype), draw(B, P + S, H).to(dtype))]


def plain(tokens, words, prompt, positions, ids=None):
    out = torch.cat([prompt.expand(len(tokens), -1, -1), F.embedding(tokens, words).float()], 1)
    return out if positions is None else out + positions[torch.arange(P + S) if ids is None else ids].float()


@IMPLEMENTATIONS
@pytest.mark.parametrize("positions", ["counted", "given", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_prompt_gradient(implementation, positions, dtype):
    device = device_of(implementation)
    tokens, words, prompt, table, grad = inputs(dtype, device)
    ids = torch.randint(0, 32, (B, P + S), device=device) if positions == "given" else None
    table = None if positions == "none" else table
    ours, theirs = prompt.clone().requires_grad_(), prompt.clone().requires_grad_()
    with launch.use(implementation):
        out = prompt_embedding(tokens, words, ours, table, ids)
        out.backward(grad)
    exact = plain(tokens, words, theirs, table, ids)
    exact.backward(grad.float())
    assert out.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(out, exact)
    else:
        torch.testing.assert_close(out.float(), exact, rtol=2**-7, atol=1e-6)  # an interpreted store truncates
    torch.testing.assert_close(ours.grad, theirs.grad)


def on_a_shard(group, implementation, bounds):
    lo, hi = bounds[group.rank()], bounds[group.rank() + 1]
    tokens, words, prompt, table, grad = inputs(device=device_of(implementation))
    prompt.requires_grad_()
    with launch.use(implementation):
        out = prompt_embedding(tokens, words[lo:hi], prompt, table, vocab_start=lo, tp_group=group)
        out.backward(grad)
    assert torch.equal(out, plain(tokens, words, prompt.detach(), table))
    assert torch.equal(prompt.grad, grad[:, :P].sum(0))


@IMPLEMENTATIONS
def test_every_split_of_the_table_gives_the_same(implementation):
    on_ranks(3, on_a_shard, implementation, [0, 20, 20, V])


@IMPLEMENTATIONS
def test_a_table_that_would_miss_its_gradient_is_refused(implementation):
    tokens, words, prompt, *_ = inputs(device=device_of(implementation))
    with launch.use(implementation):
        with pytest.raises(ValueError, match="word_weight requires a gradient: freeze it"):
            prompt_embedding(tokens, words.requires_grad_(), prompt)
        with torch.no_grad():
            prompt_embedding(tokens, words, prompt)


@pytest.mark.parametrize("implementation", ["reference", "rows"])
def test_on_one_rank_a_token_or_position_without_a_row_is_an_error(implementation):
    tokens, words, prompt, positions, _ = inputs()
    with launch.use(implementation):
        with pytest.raises(IndexError):
            prompt_embedding(tokens + V, words, prompt)
        with pytest.raises(IndexError):
            prompt_embedding(tokens, words, prompt, positions[: P + 1])
