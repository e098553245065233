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

from megakd.data.batch import Batch, Sample, micro_batches
from megakd.data.dataloader import split_across_dp
from megakd.losses.distillation import BIASES, Divergence, label_loss
from megakd.losses.token_loss import TokenLoss
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.schedules import evaluate_loss, token_means
from megakd.teachers.teacher import Teacher

MICRO_BATCHES_PER_PASS = 8  # hidden states of a pass are kept; more fill the pipeline better


def held_out_losses(
    model: HiddenStateGPTModel,
    teacher: Teacher | None = None,
    *,
    samples: Sequence[Sample],
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    pack: bool = False,
    samples_per_pass: int | None = None,
    divergences: Sequence[str] = ("reverse_kl", "forward_kl"),
    soft_prompt: torch.Tensor | None = None,
) -> dict[str, float]:
    """The means by name, and the number of `tokens`, on every rank. Without a teacher only `lm_loss`.

    soft_prompt: [P, H], before every text of the model.
    samples_per_pass: on each replica; default: as many as fill MICRO_BATCHES_PER_PASS.
    """
    layout, divergences = model.layout, tuple(divergences) if teacher else ()
    names = ("lm_loss", *divergences, *(BIASES if teacher and teacher.truncates else ()))
    sums = torch.zeros(len(names) + 1, dtype=torch.double, device=layout.device)
    shares = split_across_dp(samples, layout.dp_size)
    for part in passes(shares[layout.dp_rank], micro_batch_size, samples_per_pass, longest=max(map(len, shares))):
        batches = micro_batches(part, micro_batch_size, most_tokens=micro_batch_tokens, pack=pack, device=layout.device)
        sums += sums_of(model, teacher, batches, divergences, names, soft_prompt)
    return {name: float(value) for name, value in token_means(sums, names, layout).items()}


def passes(
    samples: Sequence[Sample], micro_batch_size: int, step: int | None = None, *, longest: int = 0
) -> Iterator[Sequence[Sample]]:
    """As many samples as go through the pipeline together; passes enough for the replica with the `longest` share, for a teacher may be
    asked by all replicas at once."""
    step = step or micro_batch_size * MICRO_BATCHES_PER_PASS
    for first in range(0, max(len(samples), longest), step):
        yield samples[first : first + step]


def sums_of(
    model: HiddenStateGPTModel,
    teacher: Teacher | None,
    batches: Sequence[Batch],
    divergences: Sequence[str],
    names: Sequence[str],
    soft_prompt: torch.Tensor | None,
) -> torch.Tensor:
    """Sums of the names and, last, the token count, on every stage."""
    vocabulary = VocabShard(model.real_vocab_size, tp_group=model.layout.tp_group)

    def loss(q, batch, p):
        lm = label_loss(q, batch.supervised_labels, vocabulary)
        logs = {"lm_loss": lm}
        for name in divergences:
            logs[name], bias = Divergence(name).with_bias(q, p, vocabulary)
            logs |= bias
        return TokenLoss(lm, logs)

    context = teacher.read(batches, to=model.layout) if teacher else ()
    return evaluate_loss(model, batches, loss, names, context, soft_prompt)
