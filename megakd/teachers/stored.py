"""A teacher whose targets were written beforehand: it reads no text, and there is no model.

N supervised positions, V ids that count, Vp columns of this rank, H hidden size, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megakd_kernels import TopKRows
from torch import Tensor

from megakd.checkpointing.teacher_store import TeacherStore, key_of
from megakd.data.batch import Batch
from megakd.losses.token_loss import HeadRows, LogitRows, Rows
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.teachers.teacher import Teacher


class StoredTeacher(Teacher):
    """Rows from a store, for the vocabulary shards of a student."""

    def __init__(self, store: TeacherStore, student: HiddenStateGPTModel):
        self.store, self.truncates = store, store.description.kind == "topk"
        layout = student.layout
        width = student.vocab_size // layout.tp_size
        self.shard = slice(layout.tp_rank * width, (layout.tp_rank + 1) * width)
        has_head = store.description.kind == "hidden" and layout.is_last_stage
        self.head_VpH = self._padded(store.head(self._real).t()).t().contiguous().to(layout.device) if has_head else None

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout) -> list[Rows]:
        return [self._rows(batch, to) for batch in batches] if to.is_last_stage else []

    @property
    def _real(self) -> slice:
        """Of this rank's ids those that the teacher has."""
        size = self.store.description.vocab_size
        return slice(min(self.shard.start, size), min(self.shard.stop, size))

    def _padded(self, columns_NV: Tensor) -> Tensor:
        """As many columns as the student has: what has no probability is 0."""
        return F.pad(columns_NV, (0, self.shard.stop - self.shard.start - columns_NV.shape[1]))

    def _rows(self, batch: Batch, to: ParallelLayout) -> Rows:
        columns = {"logits": self._real}
        texts = [self.store.read(key_of(sample), columns) for sample in batch.samples]
        found = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
        if "logits" in found:
            return LogitRows(self._padded(found["logits"]).to(to.device))
        found = {name: tensor.to(to.device, non_blocking=True) for name, tensor in found.items()}
        if "hidden" in found:
            return HeadRows(found["hidden"], self.head_VpH)
        return TopKRows(found["ids"], found["log_probs"], found["log_rest"], found["log_min"])
