"""Cross-entropy equals torch's in float64, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import NAN_ROW, WEIGHTS, assert_close, device_of, dtypes, implementations, logits, upstream, yardstick
from megakd_kernels import cross_entropy, launch

pytestmark = pytest.mark.usefixtures("small_tiles")
LABELS = torch.tensor([0, -100, 400, 7, 130])


def run(fn, z, labels, **options):
    z = z.detach().clone().requires_grad_()
    loss_N = fn(z, labels, **options)
    (loss_N * upstream().to(loss_N)).sum().backward()
    return loss_N.detach().cpu(), z.grad.cpu()


@dtypes
@implementations
def test_value_and_gradient_equal_torch(implementation, dtype):
    (z,) = logits(1, dtype=dtype)
    torchs = lambda z, labels: F.cross_entropy(z[:, :401].float() if z.dtype != torch.float64 else z[:, :401], labels,
                                               reduction="none", ignore_index=-100) * WEIGHTS.to(z)
    exact, same_dtype = run(torchs, z.double(), LABELS), run(torchs, z, LABELS)
    z[NAN_ROW] = torch.nan
    device = device_of(implementation)
    with launch.use(implementation):
        ours = run(cross_entropy, z.to(device), LABELS.to(device), weights=WEIGHTS.to(device), valid_vocab=401)
    for a, b, c in zip(ours, exact, same_dtype):
        assert_close(a, b, yardstick(c, implementation))


@implementations
def test_logits_of_30000_and_a_label_outside_the_vocabulary(implementation):
    z = torch.zeros(5, 403, device=device_of(implementation))
    z[:, 3] = 3e4
    labels = torch.tensor([3, 4, 403, -1, 3], device=z.device)
    with launch.use(implementation):
        loss_N = cross_entropy(z, labels).cpu()
    torch.testing.assert_close(loss_N[[0, 1, 4]], torch.tensor([0.0, 3e4, 0.0]))
    assert (loss_N[2:4] > 1e29).all()
