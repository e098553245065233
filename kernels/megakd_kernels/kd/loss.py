"""KD's loss as a RowLoss: cross-entropy with labels and any divergence of the same logits.

    loss = label_coef CE(z, label) + distance_coef D(z, teacher)           dz = label_coef dCE + distance_coef dD

Two losses would each multiply by the student's head three times, for z, dh and dW; of this one z is made once, and dz as a sum. With
a label_coef of 0 the cross-entropy is for the log: it costs a reading of z.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..cross_entropy.loss import LabelLoss
from ..from_logits import RowLoss


@dataclass(frozen=True, kw_only=True)
class KDLoss(RowLoss):
    """Of (student, teacher) logits, or of a student's alone where the divergence has the teacher's rows: the loss, the cross-entropy,
    and what the divergence gives."""

    labels: LabelLoss
    distance: RowLoss
    label_coef: float
    distance_coef: float

    @property
    def outputs(self) -> int:
        """The loss, the cross-entropy, and as many as the divergence has."""
        return 2 + self.distance.outputs

    @property
    def reads_once(self) -> bool:
        """As the divergence does; with a factor of 0 it would give no value."""
        return self.distance.reads_once and self.distance_coef != 0

    def of_rows(self, rows):
        return replace(self, labels=self.labels.of_rows(rows), distance=self.distance.of_rows(rows))

    def evaluate(self, logits_NV, weights_N):
        (label_N,), label_state = self.labels.evaluate(logits_NV[:1], weights_N)
        distance, state = self.distance.evaluate(logits_NV, weights_N)
        return self.with_parts(label_N, *distance), (*label_state, *state)

    def with_parts(self, label_N, distance_N, *others):
        """(loss, cross-entropy, divergence, ...), each [N]."""
        return self.label_coef * label_N + self.distance_coef * distance_N, label_N, distance_N, *others

    def differentiate(self, logits_NV, state, scale_N, grads_NV):
        dz_NV = self.label_gradient(logits_NV, state[:2], scale_N, grads_NV)
        self.distance.differentiate(logits_NV, state[2:], scale_N * self.distance_coef, grads_NV)
        if dz_NV is not None:
            grads_NV[0].add_(dz_NV)

    def at_once(self, logits_NV, scale_N, grads_NV):
        (label_N,), state = self.labels.evaluate(logits_NV[:1], scale_N)
        dz_NV = self.label_gradient(logits_NV, state, scale_N, grads_NV)
        distance = self.distance.at_once(logits_NV, scale_N * self.distance_coef, grads_NV)
        if dz_NV is not None:
            grads_NV[0].add_(dz_NV)
        return self.with_parts(label_N, *distance)

    def label_gradient(self, logits_NV, state, scale_N, grads_NV):
        """The cross-entropy's part of the student's gradient, in memory of its own: the divergence writes over the logits."""
        if not self.label_coef or grads_NV[0] is None:
            return None
        dz_NV = torch.empty_like(logits_NV[0])
        self.labels.differentiate(logits_NV[:1], state, scale_N * self.label_coef, [dz_NV])
        return dz_NV
