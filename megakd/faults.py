"""What to do when a number is none: no step is taken, and a second, slower look finds where it came from.

The losses and the gradient's norm, which are read in every iteration anyway, are looked at before the step. Only when one of them is NaN or
infinite everything is computed once more, a micro-batch at a time, and looked at on its way: what the teacher said, the embedding, each
layer, the logits, the loss, and last the gradients. Dropout is off in the second look.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.checkpointing.description import versions
from megakd.data.batch import Batch, Sample
from megakd.errors import file_errors
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.model_provider import not_finite
from megakd.models.taps import first_layers, watching
from megakd.reporting.own_folder import write_text
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.schedules import LossFunction, Windows, evaluate_loss, forward_only, supervised

ROWS_AT_ONCE = 1024  # whose logits exist together


class NonFiniteError(Exception):
    """A number of the iteration is NaN or infinite, and no step was taken on it. With what it was computed from."""

    def __init__(self, name: str, value: float, batches: Sequence[Batch] = (), context: Any = (), loss: LossFunction | None = None):
        super().__init__(f"{name} is {value}")
        self.name, self.value, self.batches, self.context, self.loss = name, value, batches, context, loss


def check_finite(numbers: Mapping[str, float], *computed_from: Any) -> None:
    """
    Raises:
        NonFiniteError: the first of the numbers that is NaN or infinite.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise NonFiniteError(name, value, *computed_from)


@dataclass(frozen=True)
class Finding:
    """A tensor that is not finite, on this rank; the least `stage` comes first in an iteration."""

    stage: tuple[int, int]
    tensor: str
    rank: int = field(default_factory=dist.get_rank)
    micro_batch: int | None = None
    samples: tuple[Sample, ...] = ()

    def __str__(self) -> str:
        ids = ", ".join(str(sample.sample_id) for sample in self.samples)
        where = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}, sample ids {ids}"
        return f"{self.tensor}, on rank {self.rank}{where}"


def find(error: NonFiniteError, student: HiddenStateGPTModel, teacher: HiddenStateGPTModel | None) -> list[Finding]:
    """All findings of all ranks of the student's layout, the earliest first; each of these ranks calls it."""
    mine = [*weights(student, "student"), *rows(error)]
    if teacher is not None:
        mine += hidden(teacher, [batch.for_teacher for batch in error.batches], "teacher", 10)
    mine += [*hidden(student, error.batches, "student", 20), *losses(error, student), *gradients(student)]
    return sorted(everywhere(mine, student.layout), key=lambda finding: (finding.stage, finding.micro_batch or 0, finding.rank))


def write_down(
    folder: Path, iteration: int, error: NonFiniteError, findings: Sequence[Finding], config: Mapping[str, Any], latest: int | None
) -> Path:
    """FOLDER/iteration_0000012.json: what was found, the rows of the first finding, and how to come to it again."""
    rows = [asdict(sample) for sample in findings[0].samples] if findings else []
    again = f"the same command, from {'the start' if latest is None else f'the checkpoint of iteration {latest}'}: nothing random is saved"
    content = {
        "iteration": iteration,
        "found": {error.name: str(error.value)},
        "first": str(findings[0]) if findings else None,
        "all": list(map(str, findings)),
        "rows": rows,
        "again": again,
        "versions": versions(),
        "config": dict(config),
    }
    file = folder / f"iteration_{iteration:07d}.json"
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return file


def weights(model: HiddenStateGPTModel, whose: str) -> Iterator[Finding]:
    """The first weight that is not finite."""
    for name, param in model.named_parameters():
        if not_finite(param.detach()):
            yield Finding((0, 0), f"{whose}: weight {name}")
            return


def rows(error: NonFiniteError) -> Iterator[Finding]:
    """What the teacher said of each micro-batch, where it is still here."""
    if isinstance(error.context, Windows):
        return
    for number, (batch, said) in enumerate(zip(error.batches, error.context)):
        tensors = [value for value in getattr(said, "__dict__", {}).values() if isinstance(value, Tensor)]
        if any(tensor.is_floating_point() and not_finite(tensor.detach()) for tensor in tensors):
            yield Finding((15, 0), "what the teacher says", micro_batch=number, samples=batch.samples)
            return


def hidden(model: HiddenStateGPTModel, batches: Sequence[Batch], whose: str, begins: int) -> Iterator[Finding]:
    """The first of embedding, layers and logits of this rank that is not finite, of each micro-batch."""
    for number, batch in enumerate(batches):
        seen: list[tuple[int, str]] = []

        def look(place: int, name: str, tensor: Tensor, seen=seen) -> None:
            if not seen and not_finite(tensor.detach()):
                seen.append((place, name))

        def last(states: Tensor, batch: Batch, look=look) -> None:
            head = model.output_weight().detach()
            for part in supervised(states, batch).split(ROWS_AT_ONCE):
                look(2**20, "logits", part @ head.t())

        with looking(model, look):
            forward_only(model, [batch], keep=last)
        for place, name in seen:
            yield Finding((begins, place), f"{whose}: {name}", micro_batch=number, samples=batch.samples)


@contextmanager
def looking(model: HiddenStateGPTModel, look: Any) -> Iterator[None]:
    """`look(place, name, tensor)` at the embedding and behind each layer of this stage."""
    layers = range(first_layers(model)[model.layout.pp_rank], model.config.num_layers + 1)
    handles = []
    if model.pre_process:
        handles.append(model.embedding.register_forward_hook(lambda module, inputs, output: look(0, "embedding", output)))
    try:
        with watching(model, layers, lambda layer, states: look(layer, f"hidden state behind layer {layer}", states)):
            yield
    finally:
        for handle in handles:
            handle.remove()


def losses(error: NonFiniteError, student: HiddenStateGPTModel) -> Iterator[Finding]:
    """The loss of each micro-batch, where its context is still here."""
    if error.loss is None or isinstance(error.context, Windows) or not error.name.startswith("loss/"):
        return
    context = error.context or [None] * len(error.batches)
    for number, batch in enumerate(error.batches):
        beside = [context[number]] if len(context) else []  # on the last stage alone
        if not_finite(evaluate_loss(student, [batch], error.loss, [error.name], beside)):
            yield Finding((30, 0), error.name, micro_batch=number, samples=batch.samples)


def gradients(student: HiddenStateGPTModel) -> Iterator[Finding]:
    """The first that is not finite: of all micro-batches together."""
    for name, param in student.named_parameters():
        if getattr(param, "main_grad", None) is not None and not_finite(param.main_grad):
            yield Finding((40, 0), f"student: gradient of {name}")
            return


def everywhere(mine: Sequence[Any], layout: ParallelLayout) -> list[Any]:
    """Those of all ranks of a layout."""
    found: list[Any] = list(mine)
    for group in (layout.groups.mp, layout.dp_group):
        parts: list[Any] = [None] * group.size()
        dist.all_gather_object(parts, found, group=group)
        found = [value for part in parts for value in part]
    return found


def all_finite(model: HiddenStateGPTModel) -> bool:
    """Whether every weight of the model is, on all ranks of its layout."""
    with torch.no_grad():
        return not everywhere(list(weights(model, "student"))[:1], model.layout)
