"""How far another engine's log q of what it wrote are from the student's own: |Δ| of each token's, the mean and the largest.

    Δ = log q_engine(y_t | x, y_<t) − log q(y_t | x, y_<t)

Both are of the model's own distribution, before temperature, top-k and top-p. In float32 there is rounding, some 1e-6, in bfloat16 some
1e-2 at most; more says that the engine has other weights, or another model. One forward pass of the student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megakd_kernels import VocabShard

from megakd.config import Config
from megakd.data.batch import Sample, micro_batches
from megakd.losses.distillation import label_loss
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.teachers.live import LiveStudent

MEAN, LARGEST = "rollout/log_prob_difference", "rollout/log_prob_difference_max"


@torch.no_grad()
def log_prob_differences(
    student: HiddenStateGPTModel, samples: Sequence[Sample], log_probs: Sequence[Sequence[float]], config: Config
) -> dict[str, float]:
    """Over the tokens of all replicas, by the names they are logged under; the same on every rank.

    log_probs: of each sample's response, a number a token.
    """
    layout, training = student.layout, config.training
    numbered = [replace(sample, sample_id=number) for number, sample in enumerate(samples)]
    options = {"most_tokens": training.micro_batch_tokens, "pack": training.pack, "device": layout.device}
    batches = micro_batches(numbered, training.micro_batch_size, **options)
    vocabulary = VocabShard(student.real_vocab_size, tp_group=layout.tp_group)
    differences = [torch.zeros(0, dtype=torch.float64, device=layout.device)]
    for batch, q in zip(batches, LiveStudent(student).read(batches, to=layout)):
        theirs = torch.tensor([x for number in batch.sample_ids.tolist() for x in log_probs[number]], dtype=torch.float64)
        differences.append((theirs.to(layout.device) + label_loss(q, batch.supervised_labels, vocabulary).double()).abs())
    found = torch.cat(differences)
    total = layout.sum_over_data_parallel(torch.stack([found.sum(), found.new_tensor(len(found))]))
    largest = found.max() if len(found) else found.new_zeros(())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=layout.dp_group)
    summed, count, most = layout.broadcast_from_last_stage(torch.stack([*total, largest])).tolist()
    return {MEAN: summed / max(count, 1), LARGEST: most}
