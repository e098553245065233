"""A group of rows that are decoded together, as one pipeline stage sees it.

From stage to stage travel the tokens sampled last, [B], and the hidden states of this step, [B, S, H]; from the last stage to the
first the tokens alone. So every stage reads every token, knows the finished rows, and lets them leave without being told.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from megakd.generation.captured_step import CapturedStep
from megakd.generation.decoder import aligned, has_fixed_steps
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
    response: list[int] = field(default_factory=list)
    finished: bool = False

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
    """Rows in the order longest prompt first.

    On a GPU the decode step is captured as a CUDA graph: it attends to the whole cache, and rows leave by halves, because each number of
    rows is another graph; finished ones stay to fill a half. Its tokens stay on the device and are looked at every few steps, on all
    stages after the same ones: what a row was given after its end is left out, and the GPU seldom waits.
    """

    def __init__(self, rows: list[Row], components: Sequence[MixtureComponent], sampler: Sampler):
        self.rows, self.sampler, self.layout = rows, sampler, components[0].model.layout
        self.longest, self.device = max(row.limit for row in rows), self.layout.device
        self.captures = is_capturable(self.device, sampler.sampling) and all(has_fixed_steps(component.model) for component in components)
        self.room = self._room(components)
        self.decoders = self.room.decoders
        streams = noise_streams(sampler.sampling.seed, [row.sample_id for row in rows], self.device)
        self.room.streams_B.copy_(streams)
        for decoder, component, prompts in zip(self.decoders, components, zip(*(row.prompts for row in rows))):
            decoder.begin(prompts, component.soft_prompt)
        self.seen_BK = self._prompts(0) if sampler.sampling.limits_repetition else None
        self.read = 0  # response tokens that this stage has read
        self.unseen: list[Tensor] = []  # [B] each, read since the last ones came to the host
        self.prefilled = self.finished = False

    def _room(self, components: Sequence[MixtureComponent]) -> Room:
        """As wide as the longest prompt and what will be behind it; kept where steps are captured."""
        widths = [max(map(len, prompts)) for prompts in zip(*(row.prompts for row in self.rows))]
        columns = [aligned(component.soft_length + width + self.longest) for component, width in zip(components, widths)]
        needs = components, self.sampler, len(self.rows), columns
        self.rooms = Rooms.of(components[0].model)
        return self.rooms.take(*needs) if self.captures else Room(*needs)

    def buffers(self) -> list[Tensor]:
        """The first stage needs no message to begin; later it waits for tokens. Other stages wait for hidden states as well."""
        tokens = [torch.empty(len(self.rows), dtype=torch.int64, device=self.device)] if self.prefilled else []
        return tokens if self.layout.is_first_stage else tokens + self._hidden_buffers()

    def _hidden_buffers(self) -> list[Tensor]:
        return [x for decoder in self.decoders for x in decoder.buffers(len(self.rows), prefill=not self.prefilled)]

    def advance(self, message: list[Tensor]) -> list[Tensor]:
        """One column of every row through this stage; the first time, the prompts."""
        if not self.prefilled:
            out = self.prefill(message)
            self.prefilled = True
            return out
        tokens_B, *hidden = message
        self.record(tokens_B)
        if self.finished:  # the last tokens go round; nothing is left to compute
            return [] if self.layout.is_last_stage else [tokens_B, *self._hidden_buffers()]
        if self.layout.pp_size == 1:
            tokens_B = tokens_B[self.drop_finished()]
        out = self.step(tokens_B, torch.full((), self.read - 1, device=self.device), *hidden)
        stay = self.drop_finished()  # the next stage does not know yet and waits for all rows; the first stage has dropped them
        return [out[0][stay]] if self.layout.is_last_stage else [tokens_B, *out]

    def prefill(self, hidden: list[Tensor]) -> list[Tensor]:
        """The prompts, or their hidden states: hidden states for the next stage, or on the last the first tokens."""
        given, states = iter(hidden), []
        for component, decoder in enumerate(self.decoders):
            states += decoder.prefill(self._prompts(component).clamp(min=0), list(islice(given, len(decoder.slices))))
        return self.room.sample(states, torch.zeros((), dtype=torch.int64, device=self.device), self.seen_BK)

    def _prompts(self, component: int) -> Tensor:
        """[B, W] of what it reads, its padding, on the left, -1."""
        width = self.decoders[component].width
        read = [row.prompts[component] for row in self.rows]
        return self._on_device([[-1] * (width - len(prompt)) + list(prompt) for prompt in read])

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
        filled = [decoder.width + self.read for decoder in self.decoders]
        stages = zip(self.decoders, filled, *([hidden] if hidden else []))
        return self.room.sample([decoder.decode(tokens_B, step, *rest) for decoder, *rest in stages], step + 1, self.seen_BK)

    def record(self, tokens_B: Tensor) -> None:
        """The tokens [B] of one step. Rows that have ended but not left sample on; theirs are dropped."""
        self.read += 1
        self.unseen.append(tokens_B.clone())  # the next replay of a graph writes over its output
        if not self.captures or self.read % SYNC_EVERY == 0 or self.read == self.longest:
            self.sync_tokens_to_host()
        if self.sampler.sampling.limits_repetition:
            self.seen_BK = torch.cat([self.seen_BK, tokens_B[:, None]], 1)

    def sync_tokens_to_host(self) -> None:
        """Bring the tokens to the host: what they say, and which rows they end."""
        for tokens in torch.stack(self.unseen).tolist():
            for row, token in zip(self.rows, tokens):
                row.append(token)
        self.unseen.clear()
        self.finished = all(row.finished for row in self.rows)
        if self.finished and self.captures:
            self.rooms.give_back(self.room, self.layout.pp_size)

    def drop_finished(self) -> slice | Tensor:
        """Let finished rows leave; returns where the rows that stay were before."""
        live = [i for i, row in enumerate(self.rows) if not row.finished]
        size = self._size_for(len(live))
        if size == len(self.rows):
            return slice(None)
        gaps = [i for i in range(size) if self.rows[i].finished]
        movers = [i for i in live if i >= size]
        order = list(range(size))
        for gap, mover in zip(gaps, movers):
            order[gap] = mover
        order_B, sources, targets = map(self._on_device, (order, movers, gaps[: len(movers)]))
        for decoder in self.decoders:
            decoder.keep(order_B, sources, targets, decoder.width + self.read)
        self.rows = [self.rows[i] for i in order]
        self.room.streams_B[:size] = self.room.streams_B[order_B]
        self.seen_BK = None if self.seen_BK is None else self.seen_BK[order_B]
        return order_B

    def _size_for(self, live: int) -> int:
        """Rows that stay where so many are not finished: those alone, or by halves."""
        size = len(self.rows)
        if not self.captures:
            return live
        while size // 2 >= max(live, 1):
            size //= 2
        return size

    def _on_device(self, numbers: list) -> Tensor:
        """Without waiting for it."""
        return torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)
