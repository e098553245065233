"""Held-out losses on gold responses: token means over a whole data set, EOS included.

    lm_loss      -log q(y_t | y_<t, x)
    reverse_kl   KL(q‖p)                      q the model, p the teacher, both read the gold response
    forward_kl   KL(p‖q)
    *_kl_bias    of a teacher that was stored truncated: what the KL of whole rows is above these, at most
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megakd_kernels import VocabShard

from megakd.data.batch import Sample, micro_batches
from megakd.data.dataloader import split_across_dp
from megakd.losses.distillation import BIASES, Divergence, label_loss
from megakd.losses.token_loss import TokenLoss
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.schedules import evaluate_loss, token_means
from megakd.teachers.teacher import Teacher

MICRO_BATCHES_PER_PASS = 8  # hidden states of a pass are kept; more fill the pipeline better


def held_out_losses(
    model: HiddenStateGPTModel, teacher: Teacher | None = None, *, samples: Sequence[Sample], micro_batch_size: int
) -> dict[str, float]:
    """The means by name, and the number of `tokens`, on every rank. Without a teacher only `lm_loss`."""
    layout = model.layout
    names = ("lm_loss", "reverse_kl", "forward_kl", *(BIASES if teacher.truncates else ())) if teacher else ("lm_loss",)
    sums = torch.zeros(len(names) + 1, dtype=torch.double, device=layout.device)
    for part in passes(split_across_dp(samples, layout.dp_size)[layout.dp_rank], micro_batch_size):
        sums += sums_of(model, teacher, part, names, micro_batch_size)
    return {name: float(value) for name, value in token_means(sums, names, layout).items()}


def passes(samples: Sequence[Sample], micro_batch_size: int) -> Iterator[Sequence[Sample]]:
    """As many samples as go through the pipeline together."""
    step = micro_batch_size * MICRO_BATCHES_PER_PASS
    for first in range(0, len(samples), step):
        yield samples[first : first + step]


def sums_of(model, teacher, samples: Sequence[Sample], names: Sequence[str], micro_batch_size: int) -> torch.Tensor:
    """Sums of `names` and the token count over some samples, on every stage."""
    batches = micro_batches(samples, micro_batch_size, device=model.layout.device)
    vocabulary = VocabShard(model.real_vocab_size, tp_group=model.layout.tp_group)

    def loss(q, batch, p):
        lm = label_loss(q, batch.supervised_labels, vocabulary)
        if not teacher:
            return TokenLoss(lm, {"lm_loss": lm})
        found = {name: Divergence(name).with_bias(q, p, vocabulary) for name in ("reverse_kl", "forward_kl")}
        return TokenLoss(lm, {"lm_loss": lm} | {name: distance for name, (distance, _) in found.items()} | found["reverse_kl"][1])

    return evaluate_loss(model, batches, loss, names, teacher.read(batches, to=model.layout) if teacher else ())
