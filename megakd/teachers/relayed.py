"""A teacher in a layout of its own, over the student's ranks or over ranks of its own.

One object on every rank of the job, whose methods each rank calls at the same time. Where the teacher has its own ranks, those `serve`:
they call what the student's ranks call, until these are done. relay.py says what travels, and why nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megakd.data.batch import Batch, Sample
from megakd.errors import UserError, tell
from megakd.losses.token_loss import HeadRows
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.reporting.stopwatch import Stopwatch
from megakd.runtime.parallel_layout import Grid, ParallelLayout
from megakd.schedules import Windows
from megakd.teachers.live import LiveTeacher
from megakd.teachers.relay import Assignment, Relay, Side
from megakd.teachers.teacher import Teacher

DONE = None  # the last request


class RelayedTeacher(Teacher):
    """The teacher's stage, where this rank has one, and the way to the student."""

    def __init__(self, relay: Relay):
        self.relay = relay
        self.head_VpH = relay.cut_head(relay.teacher, relay.student)  # where the student's losses are taken
        self.attached: Any = None

    @classmethod
    def between(
        cls, grids: tuple[Grid, Grid], student: HiddenStateGPTModel | None, teacher: HiddenStateGPTModel | None
    ) -> RelayedTeacher:
        """The way between two models on their `grids`; every rank of the job calls it with what it has of them."""
        return cls(Relay(*known_everywhere(grids, (student, teacher))))

    @property
    def layout(self) -> Grid:
        return self.relay.teacher.grid

    @property
    def line(self) -> str:
        """Where it lives, and what travels, for people to read."""
        student, teacher = self.relay.student, self.relay.teacher
        grid, ranks = teacher.grid, teacher.grid.places.flatten().tolist()
        last = f" to {ranks[-1]}" if ranks[1:] else ""
        return (
            f"the teacher is TP {grid.tp_size} × PP {grid.pp_size} × DP {grid.dp_size} on rank(s) {ranks[0]}{last}; of each token "
            f"that is learnt a hidden state of {teacher.hidden_size * teacher.dtype.itemsize:,} bytes travels to "
            f"{student.grid.tp_size} rank(s) of the student"
        )

    # ---- what the student's ranks ask, and the teacher's do

    def read(self, batches: Sequence[Batch], *, to: ParallelLayout | None = None) -> Windows:
        return self._read(batches, prompted=False)

    def read_prompted(self, batches: Sequence[Batch], *, to: ParallelLayout | None = None) -> Windows:
        return self._read(batches, prompted=True)

    def attach(self, kind: Callable, *arguments: Any) -> Any:
        self.relay.announce(("attach", (kind, *arguments)))
        if (model := self.relay.teacher.model) is not None:
            self.attached = kind(model, *arguments)
        return self.attached

    def learn(
        self, student: HiddenStateGPTModel, batches: Sequence[Batch], iteration: int, *, time: Stopwatch
    ) -> dict[str, float]:
        assert student is self.relay.student.model, "the student is who is listened to"
        self.relay.announce(("_learn", ((), iteration)))
        with time("prompt_step"):
            return self._learn(batches, iteration)

    def write(self, samples: Sequence[Sample]) -> list[Sample]:
        self.relay.announce(("_write", ((),)))
        return self._write(samples)

    def state(self) -> dict[str, Tensor]:
        self.relay.announce(("_state", ()))
        return self._state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.relay.announce(("_restore", (tensors,)))
        self._restore(tensors)

    def on_teacher_ranks(self, work: Callable, *arguments: Any) -> None:
        self.relay.announce(("_on_teacher_ranks", (work, *arguments)))

    def shut_down(self) -> None:
        self.relay.announce(DONE)

    def serve(self) -> None:
        """On the teacher's own ranks: do one's part in each request, until there is none."""
        while (request := self.relay.next_request()) is not DONE:
            name, arguments = request
            getattr(self, name)(*arguments)

    # ---- each rank's part

    def _read(self, batches: Sequence[Batch], prompted: bool) -> Windows:
        relay = self.relay
        relay.announce(("_read", ((), prompted)))
        plan = relay.assign([batch.for_teacher for batch in batches], in_windows=relay.shares_ranks)
        soft_prompt = self.attached.soft_prompt if prompted and self.attached is not None else None
        parts = relay.read(relay.teacher, relay.student, plan, plan.batches, soft_prompt)
        return as_rows(parts, self.head_VpH)

    def _learn(self, batches: Sequence[Batch], iteration: int) -> dict[str, float]:
        """The student is read in its own layout, and what it says goes to the teacher's ranks, where the learner is attached."""
        relay = self.relay
        plan = relay.assign([batch.for_teacher for batch in batches], in_windows=True)
        head = relay.cut_head(relay.student, relay.teacher)
        own = {(relay.student.replica, i): batch for i, batch in enumerate(batches)}
        parts = relay.read(relay.student, relay.teacher, plan, own)
        metrics = {}
        if self.attached is not None:
            metrics = self.attached.step(self._teachers(plan), as_rows(parts, head), iteration, time=Stopwatch())
        return metrics if relay.shares_ranks else relay.broadcast_from(relay.teacher, metrics)

    def _teachers(self, plan: Assignment) -> list[Batch]:
        """What this rank's replica of the teacher reads."""
        return [plan.batches[key].to(self.relay.device) for key in self.relay.mine(self.relay.teacher, plan.keys, plan)]

    def _write(self, samples: Sequence[Sample]) -> list[Sample]:
        """The teacher's replicas share the prompts of all the student's, and answer in their own layout."""
        relay = self.relay
        asked = relay.gather(relay.student, samples)
        places = [(d, i) for d, replica in enumerate(asked) for i in range(len(replica))]
        size, mine = relay.teacher.grid.dp_size, relay.teacher.replica
        answers = [] if mine is None else self.attached.write([asked[d][i] for d, i in places[mine::size]])
        written = relay.gather(relay.teacher, answers)
        found = {place: written[number % size][number // size] for number, place in enumerate(places)}
        return [found[relay.student.replica, i] for i in range(len(samples))]

    def _state(self) -> dict[str, Tensor]:
        """Of what is attached to the teacher, on every rank; where the ranks are shared, the tensors themselves."""
        mine = {} if self.attached is None else self.attached.state_tensors()
        if self.relay.shares_ranks:
            return mine
        return self.relay.broadcast_from(self.relay.teacher, {name: x.cpu() for name, x in mine.items()})

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in (self.attached.state_tensors() if self.attached is not None else {}).items():
            tensor.copy_(tensors[name])

    def _on_teacher_ranks(self, work: Callable, *arguments: Any) -> None:
        with suppress(UserError):  # all ranks have agreed on it: the student's tell it, and end the service
            work(*arguments)


def in_its_layout(
    grids: tuple[Grid, Grid],
    student: HiddenStateGPTModel | None,
    teacher: HiddenStateGPTModel | None,
    live: Callable[[HiddenStateGPTModel], Teacher] = LiveTeacher,
) -> Teacher:
    """A `live` teacher where the student has its layout, else a relayed one, of whose place and messages a line tells."""
    if grids[0] == grids[1]:
        return live(teacher)
    relayed = RelayedTeacher.between(grids, student, teacher)
    tell(relayed.line)
    return relayed


def as_rows(parts: Iterable[tuple[int, Iterable[Tensor]]], head_VpH: Tensor | None) -> Windows:
    """Hidden states with the output layer that belongs to them; none is kept here (a generator would keep its last)."""
    return Windows((count, map(partial(HeadRows, head_VpH=head_VpH), rows)) for count, rows in parts)


def known_everywhere(grids: tuple[Grid, Grid], models: tuple[HiddenStateGPTModel | None, ...]) -> list[Side]:
    """Both sides, with what a rank without the model has to know of it."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    facts = [model and (model.embedding_size, model.config.params_dtype, model.vocab_size) for model in models]
    torch.distributed.all_gather_object(everyone, facts)
    return [Side(grid, *everyone[grid.first][which], models[which]) for which, grid in enumerate(grids)]
