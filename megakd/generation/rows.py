"""A group of rows that are decoded together, as one pipeline stage sees it.

A row that has ended leaves, and a waiting one takes its place at once: its prompt is read in the turn in which the others take their
next step. From stage to stage travel the tokens sampled last, [B], the hidden states of this step, [B, S, H], and those of the prompts
that are read; from the last stage to the first the tokens alone. So every stage reads every token, knows which rows have ended and
which follow them, and lets them go and come without being told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megakd.generation.captured_step import CapturedStep
from megakd.generation.decoder import aligned, has_fixed_steps, left_padded
from megakd.generation.mixture import MixtureComponent
from megakd.generation.room import Room, Rooms
from megakd.generation.sampling import NO_TOKEN, Sampler, Sampling, noise_streams

SYNC_EVERY = 8  # steps of a captured group before its tokens come to the host: to fetch them waits for the GPU


@dataclass
class Row:
    """A prompt and, token by token, its response."""

    prompts: Sequence[Sequence[int]]  # what each component of the mixture reads
    sample_id: int
    limit: int  # most tokens of the response
    ends: Collection[int]  # ids, each of which ends the response
    generation: int = 0  # which answer to the prompt
    response: list[int] = field(default_factory=list)
    finished: bool = False
    joined: int = 0  # steps that its group had taken when its prompt was read

    @property
    def prompt(self) -> Sequence[int]:
        """What the first component reads."""
        return self.prompts[0]

    def append(self, token: int) -> None:
        """One more token, unless the response has ended. NO_TOKEN ends it, too: nothing can follow."""
        if not self.finished:
            self.response.append(token)
            self.finished = token in self.ends or token == NO_TOKEN or len(self.response) == self.limit


def is_capturable(device: torch.device, sampling: Sampling) -> bool:
    """Limits of repetition look back at a history that grows, so their step has no fixed shape."""
    return device.type == "cuda" and not sampling.limits_repetition


class RowGroup:
    """Rows that came longest prompt first, and `waiting`, which all groups of a stage share, for those that follow them.

    On a GPU the decode step is captured as a CUDA graph: it attends to the whole cache, and rows leave by halves, because each number of
    rows is another graph; finished ones stay to fill a half. Its tokens stay on the device and are looked at every few steps, on all
    stages after the same ones: what a row was given after its end is left out, and the GPU seldom waits.
    """

    def __init__(
        self, rows: Sequence[Row], components: Sequence[MixtureComponent], sampler: Sampler, waiting: deque[Row] | None = None
    ):
        self.rows: list[Row] = []
        self.waiting = deque() if waiting is None else waiting
        self.sampler, self.layout, self.capacity = sampler, components[0].model.layout, len(rows)
        self.device = self.layout.device
        self.captures = is_capturable(self.device, sampler.sampling) and all(has_fixed_steps(component.model) for component in components)
        all_rows = [*rows, *self.waiting]
        widths = [max(map(len, prompts)) for prompts in zip(*(row.prompts for row in all_rows))]
        self.room = self._room(components, widths, max(row.limit for row in all_rows))
        self.decoders = self.room.decoders
        for decoder, component, width in zip(self.decoders, components, widths):
            decoder.begin(width, component.soft_prompt)
        self._expect(rows)
        self.seen_BK: Tensor | None = None  # prompts and responses of the rows, where repetition is limited
        self.read = 0  # tokens of each row that this stage has read: steps
        self.unseen: list[Tensor] = []  # [B] each, read since the last ones came to the host
        self.finished = False

    def _room(self, components: Sequence[MixtureComponent], widths: Sequence[int], longest: int) -> Room:
        """As wide as the longest prompt and what will be behind it; kept where steps are captured."""
        columns = [aligned(component.soft_length + width + longest) for component, width in zip(components, widths)]
        needs = components, self.sampler, self.capacity, columns
        self.rooms = Rooms.of(components[0].model)
        return self.rooms.take(*needs) if self.captures else Room(*needs)

    def _expect(self, rows: Sequence[Row]) -> None:
        """The rows that join at the next step. Neighbours with the same prompts read them once."""
        self.joining, self.prompt_of, reading = list(rows), [], []
        for row in rows:
            if not reading or row.prompts != reading[-1].prompts:
                reading.append(row)
            self.prompt_of.append(len(reading) - 1)
        for decoder, prompts in zip(self.decoders, zip(*(row.prompts for row in reading))):
            decoder.expect(prompts)

    def buffers(self) -> list[Tensor]:
        """The first stage waits for the tokens of rows that are under way. Other stages wait for hidden states as well."""
        tokens = [torch.empty(len(self.rows), dtype=torch.int64, device=self.device)] if self.rows else []
        return tokens if self.layout.is_first_stage else tokens + self._hidden_buffers()

    def _hidden_buffers(self) -> list[Tensor]:
        of_step = [decoder.step_buffer(len(self.rows)) for decoder in self.decoders] if self.rows else []
        return of_step + [x for decoder in self.decoders if self.joining for x in decoder.prefill_buffers()]

    def advance(self, message: list[Tensor]) -> list[Tensor]:
        """One column of every row through this stage, and the prompts of those that join."""
        tokens, hidden = (message[:1], message[1:]) if self.rows else ([], message)
        if tokens:
            self.record(*tokens)
        if self.finished:  # the last tokens go round; nothing is left to compute
            return [] if self.layout.is_last_stage else [*tokens, *self._hidden_buffers()]
        if tokens and self.layout.pp_size == 1:
            tokens = [tokens[0][self.drop_finished()]]
        out = self.compute(tokens, hidden)
        stay = self.drop_finished()  # the next stage does not know yet and waits for all rows; the first stage has dropped them
        if self.layout.is_last_stage:
            return [out[0][stay]] if self.rows else []
        return [*tokens, *out]

    def compute(self, tokens: list[Tensor], hidden: list[Tensor]) -> list[Tensor]:
        """The tokens of rows that are under way, and the prompts of those that join, or their hidden states: hidden states for the next
        stage, or on the last the next tokens of all."""
        under_way = len(self.rows)
        of_step = len(self.decoders) if hidden and under_way else 0
        out = self.step(*tokens, torch.full((), self.read - 1, device=self.device), *hidden[:of_step]) if under_way else []
        if not self.joining:
            return out
        first = under_way - len(self.joining) if under_way and self.captures else under_way  # finished rows held their places
        read = self.prefill(first, hidden[of_step:])
        self.rows = self.rows[:first] + self.joining
        self.joining = []
        if not self.layout.is_last_stage:
            return [*out, *read]
        return [torch.cat([out[0][:first], *read])] if out else read

    def prefill(self, first: int, hidden: list[Tensor]) -> list[Tensor]:
        """The prompts of the joining rows, whose places begin at `first`."""
        seats, given, states = slice(first, first + len(self.joining)), iter(hidden), []
        ids, generations = zip(*((row.sample_id, row.generation) for row in self.joining))
        self.room.streams_B[seats] = noise_streams(self.sampler.sampling.seed, ids, self.device, generations)
        self.room.joined_B[seats] = self.read
        for row in self.joining:
            row.joined = self.read
        for decoder in self.decoders:
            mine = [next(given) for _ in decoder.slices] if hidden else []
            states += decoder.prefill(mine, first=first, joined=self.read, prompt_of=self.prompt_of)
        if self.layout.is_last_stage and len(states[0]) < len(self.joining):
            states = [logits[self._on_device(self.prompt_of)] for logits in states]
        seen_BK = self._join_seen() if self.sampler.sampling.limits_repetition else None
        return self.room.sample(states, torch.full((), self.read, device=self.device), seen_BK, first=first)

    def _join_seen(self) -> Tensor:
        """[joining, K]: their prompts, padded on the left with -1; `seen_BK` has them, too, and no column that nobody needs."""
        longest = max([len(row.prompt) + len(row.response) for row in self.rows], default=0)
        seen = left_padded([row.prompt for row in self.joining], self.device, width=longest, padding=-1)
        before = [F.pad(self.seen_BK[:, -longest:], (seen.shape[1] - longest, 0), value=-1)] if self.rows else []
        self.seen_BK = torch.cat([*before, seen])
        return seen

    def step(self, *inputs: Tensor) -> list[Tensor]:
        """`decode`, captured where it can be."""
        if not self.captures:
            return self.decode(*inputs)
        steps, rows = self.room.steps, len(inputs[0])
        if rows not in steps:
            steps[rows] = CapturedStep(self.room.decode, *inputs)
        return steps[rows](*inputs)

    def decode(self, tokens_B: Tensor, step: Tensor, *hidden: Tensor) -> list[Tensor]:
        """As the room's, but of the cache what is filled alone is read."""
        written = [decoder.width + self.read for decoder in self.decoders]
        stages = zip(self.decoders, written, *([hidden] if hidden else []))
        return self.room.sample([decoder.decode(tokens_B, step, *rest) for decoder, *rest in stages], step + 1, self.seen_BK)

    def record(self, tokens_B: Tensor) -> None:
        """The tokens [B] of one step. Rows that have ended but not left sample on; theirs are dropped."""
        self.read += 1
        self.unseen.append(tokens_B.clone())  # the next replay of a graph writes over its output
        if not self.captures or self.read % SYNC_EVERY == 0 or self.read == max(row.joined + row.limit for row in self.rows):
            self.sync_tokens_to_host()
        if self.sampler.sampling.limits_repetition:
            self.seen_BK = torch.cat([self.seen_BK, tokens_B[:, None]], 1)

    def sync_tokens_to_host(self) -> None:
        """Bring the tokens to the host: what they say, and which rows they end."""
        for step, tokens in enumerate(torch.stack(self.unseen).tolist(), start=self.read - len(self.unseen)):
            for row, token in zip(self.rows, tokens):
                if step >= row.joined:  # before, another had its place
                    row.append(token)
        self.unseen.clear()
        self.finished = all(row.finished for row in self.rows) and not (self.joining or self.waiting)
        if self.finished and self.captures:
            self.rooms.give_back(self.room, self.layout.pp_size)

    def drop_finished(self) -> slice | Tensor:
        """Let finished rows leave, and waiting ones have their places; returns where the rows that stay were before.

        Where steps are captured, finished rows hold the places of those that join, the last ones, until these have read their prompts.
        """
        live = [i for i, row in enumerate(self.rows) if not row.finished]
        if self.waiting and not self.joining:
            self._expect([self.waiting.popleft() for _ in range(min(len(self.waiting), self.capacity - len(live)))])
        size = self._size_for(len(live) + len(self.joining)) if self.captures else len(live)
        seats = size - len(self.joining) if self.captures else size
        gaps = [i for i in range(seats) if self.rows[i].finished]
        movers = [i for i in live if i >= seats]
        if size == len(self.rows) and not movers:
            return slice(None)
        order = list(range(size))
        for gap, mover in zip(gaps, movers):
            order[gap] = mover
            if mover < size:
                order[mover] = gap
        order_B, sources, targets = map(self._on_device, (order, movers, gaps[: len(movers)]))
        for decoder in self.decoders:
            decoder.keep(order_B, sources, targets, decoder.width + self.read)
        self.rows = [self.rows[i] for i in order]
        for of_rows in (self.room.streams_B, self.room.joined_B):
            of_rows[:size] = of_rows[order_B]
        self.seen_BK = None if self.seen_BK is None else self.seen_BK[order_B]
        return order_B

    def _size_for(self, live: int) -> int:
        """Rows that stay where so many are not finished: by halves."""
        size = len(self.rows)
        while size // 2 >= max(live, 1):
            size //= 2
        return size

    def _on_device(self, numbers: list) -> Tensor:
        """Without waiting for it."""
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)
