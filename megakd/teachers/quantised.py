"""A live teacher whose weights are stored as codes, and what that costs: measured on the run's first batch, and told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megakd_kernels import VocabShard

from megakd.data.batch import Batch, Sample, micro_batches
from megakd.errors import tell
from megakd.losses.distillation import Divergence, label_loss
from megakd.losses.token_loss import HeadRows
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.weight_only import quantize, stored_bytes
from megakd.teachers.live import LiveTeacher

MIB = 2**20


def quantised(model: HiddenStateGPTModel, kind: str, samples: Sequence[Sample], micro_batch_size: int) -> LiveTeacher:
    """The teacher on its codes. `samples` are this replica's part of the batch that is read before and after; a prompt without a response
    is read as a text."""
    teacher, layout = LiveTeacher(model), model.layout
    batches = micro_batches([as_read(sample) for sample in samples], micro_batch_size, device=layout.device)
    size, before = stored_bytes(model), teacher.read(batches, to=layout)
    quantize(model, kind)
    loss, was, distance = difference(before, teacher.read(batches, to=layout), batches, model)
    tell(
        f"--teacher-quantize {kind}: on the first batch the teacher's loss is {loss:.4f}, {loss - was:+.4f} from {was:.4f}; "
        f"KL(teacher‖quantised) is {distance:.2e} nats a token; a rank holds {stored_bytes(model) / MIB:,.1f} MiB of {size / MIB:,.1f}"
    )
    return teacher


def as_read(sample: Sample) -> Sample:
    """With something to be predicted."""
    return sample if sample.response else Sample(sample.sample_id, (), sample.for_teacher.prompt)


@torch.no_grad()
def difference(
    before: Sequence[HeadRows], after: Sequence[HeadRows], batches: Sequence[Batch], model: HiddenStateGPTModel
) -> tuple[float, float, float]:
    """Token means over the replicas: −log p of the labels after and before, and KL(before‖after)."""
    layout, vocabulary = model.layout, VocabShard(model.real_vocab_size, tp_group=model.layout.tp_group)
    sums = torch.zeros(4, dtype=torch.double, device=layout.device)
    for p, quantised, batch in zip(before, after, batches):
        labels = batch.supervised_labels
        parts = (label_loss(quantised, labels, vocabulary), label_loss(p, labels, vocabulary), Divergence()(quantised, p, vocabulary))
        sums += torch.stack([*(x.double().sum() for x in parts), sums.new_tensor(batch.num_supervised)])
    *totals, tokens = layout.sum_over_data_parallel(layout.broadcast_from_last_stage(sums)).tolist()
    return tuple(total / max(1, tokens) for total in totals)
