"""Cross-entropy with labels, from vocabulary shards of the logits.

    loss = lse(z) - z[label]            dz = softmax(z) - [v = label]

Three floats a row (maximum A, sum of e^(z - A), the label's z - A on the rank that holds it) merge with one all-gather; backward
writes the gradient from the logits, the maximum and the sum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType

from torch import Tensor
from torch.distributed import ProcessGroup

from .. import launch
from ..from_logits import RowLoss, loss_from_logits
from ..shards import VocabShard, merge_sums
from . import reference


@dataclass(frozen=True, kw_only=True)
class LabelLoss(RowLoss):
    """Of one model's logits; `labels_N` count from this shard's first column."""

    labels_N: Tensor
    kernels: ModuleType

    def of_rows(self, rows: slice | Tensor) -> LabelLoss:
        return replace(self, labels_N=self.labels_N[rows])

    def evaluate(self, logits_NV, weights_N):
        stats_P3N = self.shard.all_gather(self.kernels.statistics(logits_NV[0], self.labels_N, weights_N))
        top, total, label = stats_P3N.unbind(1)
        row_max, total_N = merge_sums(top, total)
        return (total_N.log() - (label + (top - row_max)).amax(0),), (row_max, total_N)

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        self.kernels.gradient(logits_NV[0], self.labels_N, *state, scale_N, grads_NV[0])


def label_loss(x: Tensor, labels_N: Tensor, width: int, shard: VocabShard) -> LabelLoss:
    """The loss for tensors like x, on a shard `width` columns wide."""
    return LabelLoss(labels_N=labels_N - shard.start(width), shard=shard, kernels=launch.kernels(x, "cross_entropy"))


def cross_entropy(logits: Tensor, labels_N: Tensor, *, weights: Tensor | None = None, valid_vocab: int | None = None,
                  vocab_start: int | None = None, tp_group: ProcessGroup | None = None, inplace: bool = False) -> Tensor:
    """[N] float32 minus log-probability of each row's label, an index of the whole vocabulary, times the row's weight.

    The label of a row of weight 0 may be anything; any other label outside the vocabulary costs 1e30. The other options are those
    of `kl_div`.
    """
    if launch.implementation(logits) == "reference":
        return reference.cross_entropy(logits, labels_N, weights=weights, valid_vocab=valid_vocab, vocab_start=vocab_start,
                                       tp_group=tp_group)
    loss = label_loss(logits, labels_N, logits.shape[1], VocabShard(valid_vocab, vocab_start, tp_group))
    return loss_from_logits(loss, weights, inplace, logits)[0]
