"""What travels between two models of unequal layouts: token ids one way, hidden states of supervised positions back, output layers once.

A source is read for a learner. In most passes the teacher is read and the student learns; in PromptKD's step (b) the student is read,
and the soft prompt learns in the teacher's layout. Micro-batches are the student's: `(d, i)` is the i-th one of its d-th replica. An
assignment gives each to a replica of the teacher, and says which of them go through the pipelines together (a window).

    ids       b s · 8 bytes a micro-batch (tokens, labels), to all ranks (over gloo, between hosts' memories)
    rows      N · H bytes of the source's dtype, from its last stage to each tensor-parallel rank of the learner's last stage
    head      [V, H] of the source, cut for the learner's vocabulary shards: the teacher's once, the student's in each step (b)

Why nobody waits for ever:
  - What all ranks do together (`assign`, `cut_head`, `announce`) they do in the same order: that of the method, or of the requests.
  - On ranks that both models share, a window's rows are exchanged in one grouped call, which each rank makes when its part of the source's
    pass is over. No rank of a pass waits for a learner.
  - On ranks of their own, rows go one way through a request: the source has all the ids it needs before it begins and waits for nobody
    but its own ranks and the receiver of its last row; the learner's last stage waits for rows alone, in the order in which they are sent.
    Its replicas wait for each other only when each has had its last row, so that whose row is next is always free to take it.

Memory: on shared ranks rows of one window; on ranks of their own those of a micro-batch being learnt, of the next, and of one being sent.

N supervised positions of a micro-batch, H hidden size, V padded vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megakd.data.batch import Batch, batch_of
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.runtime.parallel_layout import Grid, own_device
from megakd.runtime.waiting import request_group, waiting
from megakd.schedules import forward_only, supervised, supervised_hidden

Key = tuple[int, int]  # (replica of the student, its micro-batch)
WINDOW = 4  # micro-batches a stage: a pipeline of p stages then stands still for at most (p - 1) / 4p of a pass


@dataclass(frozen=True)
class Side:
    """One of the two models, as every rank of the job knows it."""

    grid: Grid
    hidden_size: int
    dtype: torch.dtype
    rows: int  # of the output layer, padded: both models'
    model: HiddenStateGPTModel | None = None  # this rank's stage of it, where it has one

    @property
    def replica(self) -> int | None:
        """Which of the model's replicas this rank belongs to."""
        return self.model.layout.dp_rank if self.model else None

    @property
    def is_last_stage(self) -> bool:
        """Whether hidden states come out here."""
        return self.model is not None and self.model.layout.is_last_stage

    @property
    def speaks(self) -> bool:
        """Whether this rank tells what its replica has."""
        return self.model is not None and self.model.layout.tp_rank == self.model.layout.pp_rank == 0

    @property
    def rows_a_rank(self) -> int:
        """Rows of the output layer that a tensor-parallel rank holds."""
        return self.rows // self.grid.tp_size


@dataclass(frozen=True)
class Assignment:
    """One request's micro-batches, as the teacher reads them, known to all ranks; on the host."""

    batches: dict[Key, Batch]
    windows: list[list[Key]]  # in the order in which all ranks name them
    reader: dict[Key, int]  # the teacher's replica

    @property
    def keys(self) -> list[Key]:
        """All of them."""
        return [key for window in self.windows for key in window]


class Relay:
    """The way between the two, on every rank of the job. `student` and `teacher` are this rank's views of them."""

    def __init__(self, student: Side, teacher: Side):
        self.student, self.teacher, self.device = student, teacher, own_device()
        self.group = dist.new_group(timeout=waiting.timeout)
        self.host_group = request_group()
        self.shares_ranks = student.grid.first == teacher.grid.first
        self.sent: Counter[str] = Counter()  # bytes that this rank has given away, and the `tokens` that its replica asked about

    # ---- what all ranks do together

    def announce(self, request: Any) -> None:
        """Tell the teacher's ranks what comes next; on ranks that both share, and on the teacher's own, nobody has to be told."""
        if not self.shares_ranks and self.student.model is not None:
            dist.broadcast_object_list([request], src=0, group=self.host_group)

    def next_request(self) -> Any:
        """What the student's ranks have announced."""
        found = [None]
        dist.broadcast_object_list(found, src=0, group=self.host_group)
        return found[0]

    def broadcast_from(self, side: Side, value: Any) -> Any:
        """The value that the side's first rank has, on every rank."""
        found = [value]
        dist.broadcast_object_list(found, src=side.grid.first, group=self.host_group)
        return found[0]

    def gather(self, side: Side, value: Any) -> list[Any]:
        """What each replica of the side has, on every rank."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, value if side.speaks else None, group=self.host_group)
        return [everyone[rank] for rank in side.grid.places[0, :, 0].tolist()]

    def assign(self, batches: Sequence[Batch], *, in_windows: bool) -> Assignment:
        """Every replica of the student brings its micro-batches, any number of them; the teacher's replicas get them in turn."""
        essences = [batch.essence for batch in batches] if self.student.speaks else []
        self.sent["ids"] += sum(tokens.nbytes + labels.nbytes for tokens, labels, *_ in essences)  # to each other rank
        self.sent["tokens"] += sum(int(counted.sum()) for _, _, _, counted, _ in essences)
        replicas = self.gather(self.student, essences)
        dealt = {(d, i): batch_of(*essence) for d, replica in enumerate(replicas) for i, essence in enumerate(replica)}
        order = sorted(dealt, key=lambda key: key[::-1])
        stages = max(self.student.grid.pp_size, self.teacher.grid.pp_size)
        size = WINDOW * stages if in_windows else max(map(len, replicas), default=0)
        count = -(-max(map(len, replicas)) // size) if size else 0
        windows = [[key for key in order if key[1] // size == w] for w in range(count)]
        reader = {key: place % self.teacher.grid.dp_size for place, key in enumerate(order)}
        return Assignment(dealt, windows, reader)

    def cut_head(self, source: Side, learner: Side) -> Tensor | None:
        """The source's output layer on the learner's last stages, [V / tp, H] as the learner's vocabulary is cut; None elsewhere."""
        mine, theirs = source.model.output_weight().detach() if source.is_last_stage else None, None
        if learner.is_last_stage:
            theirs = torch.empty(learner.rows_a_rank, source.hidden_size, dtype=source.dtype, device=self.device)
        ops = Operations(self, "head")
        for replica in range(learner.grid.dp_size):
            for by, to, given, taken in common_rows(source, learner):
                sender = source.grid.last_stage_rank(replica % source.grid.dp_size, by)
                receiver = learner.grid.last_stage_rank(replica, to)
                ops.add(sender, receiver, None if mine is None else mine[given], None if theirs is None else theirs[taken])
        ops.run()
        return theirs

    # ---- rows

    def replica_of(self, side: Side, key: Key, plan: Assignment) -> int:
        """The side's replica that has the micro-batch."""
        return plan.reader[key] if side is self.teacher else key[0]

    def mine(self, side: Side, keys: Sequence[Key], plan: Assignment) -> list[Key]:
        """Those that this rank's replica of the side has; none where it has no part in it."""
        return [key for key in keys if side.model is not None and self.replica_of(side, key, plan) == side.replica]

    def routes(self, source: Side, learner: Side, key: Key, plan: Assignment) -> Iterator[tuple[int, int]]:
        """(sender, receiver) of the micro-batch's rows: one for each tensor-parallel rank of the learner's last stage."""
        by, to = (self.replica_of(side, key, plan) for side in (source, learner))
        for tp_rank in range(learner.grid.tp_size):
            sender = source.grid.last_stage_rank(by, tp_rank % source.grid.tp_size)
            yield sender, learner.grid.last_stage_rank(to, tp_rank)

    def read(
        self, source: Side, learner: Side, plan: Assignment, texts: Mapping[Key, Batch], soft_prompt: Tensor | None = None
    ) -> Iterator[tuple[int, Iterator[Tensor]]]:
        """Of every window: how many micro-batches the learner's replica has, and on its last stage the source's hidden states [N, H] of
        each. `texts` is what the source reads of them. Where no learner is, the source's part is done when this returns."""
        if self.shares_ranks:
            return self._exchanged(source, learner, plan, texts, soft_prompt)
        if source.model is not None:
            self._send(source, learner, plan, texts, soft_prompt)
            return iter(())
        stream = self._receive(source, learner, plan)
        return ((count, islice(stream, count)) for count in [len(self.mine(learner, window, plan)) for window in plan.windows])

    def _exchanged(self, source, learner, plan, texts, soft_prompt):
        for window in plan.windows:
            found = self._exchange(source, learner, plan, window, texts, soft_prompt)
            yield len(self.mine(learner, window, plan)), map(found.pop, list(found))

    def _exchange(self, source, learner, plan, window, texts, soft_prompt) -> dict[Key, Tensor]:
        """A pass of the source, and the rows of what this rank's replica of the learner has, on its last stage."""
        kept = self.mine(source, window, plan)
        hidden = supervised_hidden(source.model, [texts[key].to(self.device) for key in kept], soft_prompt)
        had = dict(zip(kept, hidden))  # on the source's last stage
        wanted = self.mine(learner, window, plan) if learner.is_last_stage else []
        found = {key: self._empty(source, plan, key) for key in wanted}
        ops = Operations(self, "rows")
        for key in window:
            for sender, receiver in self.routes(source, learner, key, plan):
                ops.add(sender, receiver, had.get(key), found.get(key))
        ops.run()
        return found

    def _send(self, source, learner, plan, texts, soft_prompt):
        """While the source makes its pass; a micro-batch's rows are on their way before the next one's are made."""
        keys = self.mine(source, plan.keys, plan)
        waiting, under_way = iter(keys), []

        def send(hidden: Tensor, batch: Batch) -> None:
            rows, key = supervised(hidden, batch).contiguous(), next(waiting)
            wait_all(under_way)
            for sender, receiver in self.routes(source, learner, key, plan):
                if sender == dist.get_rank() and rows.numel():
                    self.sent["rows"] += rows.nbytes
                    under_way.append((dist.isend(rows, receiver, group=self.group), rows))

        forward_only(source.model, [texts[key].to(self.device) for key in keys], soft_prompt, keep=send)
        wait_all(under_way)

    def _receive(self, source, learner, plan) -> Iterator[Tensor]:
        """The next micro-batch's rows come while one is learnt."""
        keys = iter(self.mine(learner, plan.keys, plan) if learner.is_last_stage else [])
        coming = self._irecv(source, learner, plan, next(keys, None))
        while coming is not None:
            request, rows = coming
            if request is not None:
                request.wait()
            coming = self._irecv(source, learner, plan, next(keys, None))
            yield rows
            del rows

    def _irecv(self, source, learner, plan, key):
        if key is None:
            return None
        rows = self._empty(source, plan, key)
        sender = next(by for by, to in self.routes(source, learner, key, plan) if to == dist.get_rank())
        return dist.irecv(rows, sender, group=self.group) if rows.numel() else None, rows

    def _empty(self, source, plan, key) -> Tensor:
        return torch.empty(plan.batches[key].num_supervised, source.hidden_size, dtype=source.dtype, device=self.device)


class Operations:
    """Messages that every rank lists in the same order and makes in one call. What stays on a rank is copied."""

    def __init__(self, relay: Relay, kind: str):
        self.relay, self.kind, self.ops = relay, kind, []

    def add(self, sender: int, receiver: int, given: Tensor | None, taken: Tensor | None) -> None:
        """`given` on the sender to `taken` on the receiver, of the same shape; nothing on other ranks."""
        me, group = dist.get_rank(), self.relay.group
        if sender == receiver == me:
            taken.copy_(given)
        elif sender == me and given.numel():
            self.relay.sent[self.kind] += given.nbytes
            self.ops.append(dist.P2POp(dist.isend, given.contiguous(), receiver, group))
        elif receiver == me and taken.numel():
            self.ops.append(dist.P2POp(dist.irecv, taken, sender, group))

    def run(self) -> None:
        """Wait until all of this rank's are made."""
        for request in dist.batch_isend_irecv(self.ops) if self.ops else ():
            request.wait()


def common_rows(source: Side, learner: Side) -> Iterator[tuple[int, int, slice, slice]]:
    """Which tensor-parallel ranks of either hold the same rows of an output layer, and where they lie in each one's shard."""
    for by in range(source.grid.tp_size):
        for to in range(learner.grid.tp_size):
            first, other = by * source.rows_a_rank, to * learner.rows_a_rank
            lo, hi = max(first, other), min(first + source.rows_a_rank, other + learner.rows_a_rank)
            if lo < hi:
                yield by, to, slice(lo - first, hi - first), slice(lo - other, hi - other)


def wait_all(under_way: list) -> None:
    """Wait until what was sent has been taken."""
    for request, _rows in under_way:
        request.wait()
    under_way.clear()
