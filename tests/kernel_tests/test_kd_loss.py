"""Labels and a teacher from one reading of the student's logits: both losses, their weighted sum's gradient, and no product twice."""

from __future__ import annotations

import megakd_kernels as mk
import pytest
import torch
from cases import error
from megakd_kernels import OBJECTIVES, TopKRows, launch
from megakd_kernels.cross_entropy.loss import LabelLoss
from ranks import on_ranks
from test_fused_linear_kl import Watch

N, V, REAL, HS, HT, K = 12, 61, 57, 8, 5, 6
LABELS = torch.tensor([3, -100, 40, 56, 0, 1, -100, 29, 30, 31, -100, 55])
WEIGHTS = torch.tensor([1.0, 0.0, 0.3] * 4, dtype=torch.float64)  # no label, no weight
WEIGHTS[[6, 10]] = 0.0
OPTIONS = {"alpha": 0.2, "beta": 0.3, "valid_vocab": REAL}


def models(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return draw(N, HS), draw(V, HS), draw(N, HT), draw(V, HT)


def buckets(teacher_hidden, teacher_head):
    """The K likeliest tokens of the teacher's rows, and one bucket for the others."""
    log_p = torch.log_softmax((teacher_hidden @ teacher_head.t()).detach()[:, :REAL], -1)
    top = log_p.topk(K, -1)
    return TopKRows(top.indices, top.values, log_p.scatter(1, top.indices, -torch.inf).logsumexp(-1))


def two_losses(hs, Ws, ht, Wt, objective, truncated, coefs):
    """The same of two operators that have proofs of their own: (sum, cross-entropy, divergence, ...)."""
    options = OPTIONS | {"weights": WEIGHTS.to(hs.dtype)}
    label_N = mk.fused_linear_cross_entropy(hs, Ws, LABELS, weights=options["weights"], valid_vocab=REAL)
    if truncated:
        distance = mk.fused_linear_topk_kl_with_bias(hs, Ws, buckets(ht, Wt), objective=objective, **options)
    else:
        distance = (mk.fused_linear_kl(hs, Ws, ht, Wt, objective=objective, temperature=1.5, **options),)
    return coefs[0] * label_N + coefs[1] * distance[0], label_N, *distance


def at_once(hs, Ws, ht, Wt, objective, truncated, coefs, **more):
    options = OPTIONS | {"weights": WEIGHTS.to(hs.dtype), "objective": objective, "chunk_rows": 5} | more
    options |= dict(zip(("label_coef", "distance_coef"), coefs))
    if truncated:
        return mk.fused_linear_topk_kd_loss(hs, Ws, buckets(ht, Wt), LABELS, **options)
    return mk.fused_linear_kd_loss(hs, Ws, ht, Wt, LABELS, temperature=1.5, **options)


def both(make, objective, truncated, coefs):
    tensors = models()
    outputs = make(*tensors, objective, truncated, coefs)
    wanted = tensors[:2] if truncated else tensors
    return [x.detach() for x in outputs], torch.autograd.grad(0.3 * outputs[0].sum(), wanted)


@pytest.mark.parametrize("implementation", ["rows", "reference"])
@pytest.mark.parametrize("coefs", [(0.4, 0.6), (0.0, 1.0), (1.0, 0.0), (0.2, 3.2)], ids=str)
@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "top-k"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_is_the_two_losses_and_their_weighted_sum(objective, truncated, coefs, implementation):
    with launch.use(implementation):
        values, grads = both(at_once, objective, truncated, coefs)
    exact_values, exact_grads = both(two_losses, objective, truncated, coefs)
    assert len(values) == len(exact_values)
    for a, b in zip(values, exact_values):
        assert error(a, b) <= 1e-12
    for a, b in zip(grads, exact_grads):
        assert error(a, b) <= 1e-12


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl", "jsd"])
def test_in_triton_too(objective, small_tiles):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = [(h @ W.t()).detach().to(device, torch.float32) for h, W in zip(*[iter(models())] * 2)]
    heads = [torch.eye(V, device=device), None]
    results = []
    for implementation in ("triton", "reference"):
        dtype = torch.float32 if implementation == "triton" else torch.float64
        hidden, eye = logits[0].to(dtype).clone().requires_grad_(), heads[0].to(dtype)
        options = OPTIONS | {"objective": objective, "weights": WEIGHTS.to(device, dtype), "label_coef": 0.4, "distance_coef": 0.6}
        with launch.use(implementation):
            outputs = mk.fused_linear_kd_loss(hidden, eye, logits[1].to(dtype), None, LABELS.to(device), **options)
            (grad,) = torch.autograd.grad(outputs[0].sum(), hidden)
        results.append([x.detach().double().cpu() for x in (*outputs, grad)])
    for ours, exact in zip(*results):
        assert error(ours, exact) <= 2e-5


def check_shards(group, truncated, bounds):
    lo, hi = bounds[group.rank()], bounds[group.rank() + 1]
    hs, Ws, ht, Wt = models()
    mine = [x.detach()[lo:hi].clone().requires_grad_() for x in (Ws, Wt)]
    options = OPTIONS | {"weights": WEIGHTS, "vocab_start": lo, "tp_group": group, "chunk_rows": 5}
    options |= {"label_coef": 0.4, "distance_coef": 0.6, "objective": "forward_kl"}
    if truncated:
        outputs = mk.fused_linear_topk_kd_loss(hs, mine[0], buckets(ht, Wt), LABELS, **options)
    else:
        outputs = mk.fused_linear_kd_loss(hs, mine[0], ht, mine[1], LABELS, temperature=1.5, **options)
    grads = torch.autograd.grad(0.3 * outputs[0].sum(), (hs, mine[0]))
    values, (whole_h, whole_W, *_) = both(two_losses, "forward_kl", truncated, (0.4, 0.6))
    for a, b in zip([*outputs, *grads], [*values, whole_h, whole_W[lo:hi]]):
        assert error(a.detach(), b) <= 1e-12
    return [x.tolist() for x in outputs]


@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "top-k"])
@pytest.mark.parametrize("bounds", [[0, 30, V], [0, 59, V]], ids=["two ranks", "a rank of padding"])
def test_it_is_the_same_on_every_split_of_the_vocabulary(bounds, truncated):
    first, second = on_ranks(2, check_shards, truncated, bounds)
    assert first == second


@pytest.mark.parametrize("label_coef", [0.4, 0.0])
def test_the_students_head_is_multiplied_once_for_both(label_coef, monkeypatch):
    differentiate, asked = LabelLoss.differentiate, []
    monkeypatch.setattr(LabelLoss, "differentiate", lambda self, *given: asked.append(differentiate(self, *given)))
    hs, Ws, ht, Wt = models()
    with Watch() as watch:
        loss = mk.fused_linear_kd_loss(hs, Ws, ht.detach(), Wt.detach(), LABELS.clamp(min=0), label_coef=label_coef, distance_coef=0.6)[0]
        loss.sum().backward()
    assert sorted(watch.products) == sorted([(N, V), (N, V), (N, HS), (V, HS)])  # z of both, dh, dW
    assert len(asked) == (label_coef > 0), "what is for the log alone has no gradient"


@pytest.mark.parametrize("truncated", [False, True], ids=["whole", "top-k"])
def test_the_weight_gradient_is_added_to_main_grad(truncated):
    hs, Ws, *teacher = models(torch.bfloat16)
    ht, Wt = (x.detach() for x in teacher)
    coefs = (0.4, 0.6)
    expected = torch.autograd.grad(at_once(hs, Ws, ht, Wt, "forward_kl", truncated, coefs)[0].sum(), Ws)[0]
    head = torch.nn.Parameter(Ws.detach())
    head.main_grad = torch.ones(V, HS)
    at_once(hs, head, ht, Wt, "forward_kl", truncated, coefs, accumulate_into_main_grad=True)[0].sum().backward()
    torch.testing.assert_close(head.main_grad - 1, expected.float(), rtol=2**-7, atol=1e-5)
    assert head.grad is None
