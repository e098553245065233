"""Hidden-state matching (Sun et al. 2019, arXiv 1908.09355; Jiao et al. 2020, arXiv 1909.10351), as a term of KD's loss:

    hidden_coef · mean over layers k of  d(W_k h_k, g_k)           h_k the student's layer k, g_k the teacher's layer round(k·L_t/L_s)

at every supervised position, d the mean squared difference (mse) or 1 − cos (cosine). W_k is the identity where both models are as
wide, and else a matrix that is trained with the student, kept in checkpoints, and no part of the export.

N supervised positions.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from megakd.models.taps import PulledOn, stage_of, supervised_rows, watching

DISTANCES = {
    "mse": lambda q_NH, p_NH: (q_NH - p_NH).square().mean(-1),
    "cosine": lambda q_NH, p_NH: 1 - F.cosine_similarity(q_NH, p_NH, dim=-1),
}


def projections(student, teacher, settings, seed):
    """W_k by name, of the layers on this stage; none where both models are as wide. The same numbers at any layout."""
    if not settings.hidden_coef:
        return {}
    wide, wider = student.config.hidden_size, teacher.model.config.hidden_size
    here = [k for k in matched_layers(settings, student) if stage_of(student, k) == student.layout.pp_rank and wide != wider]
    return {projection_name(k): projection(wide, wider, student, seed + k) for k in here}


def projection_name(layer):
    """Of W_k among the student's `method_parts`."""
    return f"project_{layer}"


def projection(wide, wider, student, seed):
    """A linear layer without bias, on the student's device and in its dtype."""
    linear = torch.nn.Linear(wide, wider, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(wider, wide, generator=generator) / math.sqrt(wide))
    return linear.to(student.layout.device, student.config.params_dtype)


def matched_layers(settings, student):
    """--hidden-layers, by default the student's last."""
    return settings.hidden_layers or (student.config.num_layers,)


class HiddenMatching:
    """The term for one optimizer step: the teacher's layers are read first, then the student's are pulled on as it runs."""

    def __init__(self, student, teacher, settings, batches):
        self.student, self.settings, self.batches = student, settings, batches
        ratio = teacher.model.config.num_layers / student.config.num_layers
        self.partner = {k: round(k * ratio) for k in matched_layers(settings, student)}
        self.teacher_rows = teacher.read_layers(batches, sorted(set(self.partner.values())), to=student.layout)
        self.seen = dict.fromkeys(self.partner, 0)  # micro-batches that each layer has been run on
        self.sum = torch.zeros((), dtype=torch.double, device=student.layout.device)

    @contextmanager
    def pulling(self):
        """While the student makes its forward and backward passes over the batches."""
        with watching(self.student, list(self.partner), self._pull):
            yield

    def _pull(self, k, hidden):
        number, self.seen[k] = self.seen[k], self.seen[k] + 1
        q_NH = supervised_rows(self.student, hidden, self.batches[number])
        if (name := projection_name(k)) in self.student.method_parts:
            q_NH = self.student.method_parts[name](q_NH)
        p_NH = self.teacher_rows[number][self.partner[k]]
        distance = DISTANCES[self.settings.hidden_loss](q_NH.float(), p_NH.float()).sum() / len(self.partner)
        self.sum += distance.detach()
        return PulledOn.apply(hidden, self.settings.hidden_coef * distance)

    def mean(self, tokens):
        """The distance per token of the global batch, on every rank."""
        layout = self.student.layout
        if layout.pp_size > 1:
            torch.distributed.all_reduce(self.sum, group=layout.pp_group)
        return layout.sum_over_data_parallel(self.sum).item() / tokens
