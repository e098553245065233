"""Room for a group of rows on one pipeline stage: caches, and all else that a decode step reads, at addresses that stay.

A captured step reads and writes by address. So on a GPU room is kept when its rows have ended, with its captured steps, for the next
group of as many rows, of this iteration or a later one: in a run each number of rows is captured once. Weights stay where they are
while they learn; where they have moved (a teacher that is away between its passes), room is made anew. On a CPU nothing is captured
or kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megakd.generation.captured_step import CapturedStep
from megakd.generation.decoder import Decoder, aligned
from megakd.generation.mixture import MixtureComponent
from megakd.generation.sampling import Sampler, Sampling
from megakd.models.gpt_model import HiddenStateGPTModel

KEPT_COLUMNS = 128  # kept room is as wide as a multiple of it: groups with somewhat longer prompts find it wide enough
KEPT_ROOMS = 2  # for each stage's group under way: training's, and one of other size or for evaluation


class Room:
    """For as many `rows`, of so many `columns` for each component."""

    def __init__(self, components: Sequence[MixtureComponent], sampler: Sampler, rows: int, columns: Sequence[int]):
        self.sampler, self.rows, self.columns = sampler, rows, list(columns)
        parts = list(zip(components, columns))
        self.decoders = [Decoder(part.model, rows, width, soft_length=part.soft_length) for part, width in parts]
        self.streams_B = torch.zeros(rows, dtype=torch.int64, device=self.decoders[0].device)
        self.joined_B = torch.zeros_like(self.streams_B)  # the step at which each row's response begins
        self.steps: dict[int, CapturedStep] = {}  # by the number of rows
        self.addresses = addresses(components)

    def serves(self, components: Sequence[MixtureComponent], sampler: Sampler, rows: int, columns: Sequence[int]) -> bool:
        """Whether a group that needs so much can have it: the same models, drawn from alike, at the same addresses."""
        soft = [component.soft_length for component in components]
        return (
            (self.rows, choice(self.sampler)) == (rows, choice(sampler))
            and [decoder.soft_length for decoder in self.decoders] == soft
            and all(has >= needs for has, needs in zip(self.columns, columns))
            and self.addresses == addresses(components)
        )

    def decode(self, tokens_B: Tensor, step: Tensor, *hidden: Tensor) -> list[Tensor]:
        """The tokens that a step reads, or their hidden states: hidden states, or on the last stage the next tokens. Whole caches are
        attended to, so that steps differ in the numbers of tensors alone."""
        states = [decoder.decode(tokens_B, step, None, *rest) for decoder, *rest in zip(self.decoders, *([hidden] if hidden else []))]
        return self.sample(states, step + 1)

    def sample(self, states: list[Tensor], step: Tensor, seen_BK: Tensor | None = None, *, first: int = 0) -> list[Tensor]:
        """On the last stage the tokens [B] that a step will read, of the rows from `first` on; else what there is to hand on."""
        model = self.decoders[0].model
        if not model.layout.is_last_stage:
            return states
        rows = slice(first, first + len(states[0]))
        return [self.sampler(states, self.streams_B[rows], step - self.joined_B[rows], seen_BK)]


@dataclass
class Rooms:
    """A model's kept ones that no group is in, the last used last."""

    free: list[Room] = field(default_factory=list)

    @classmethod
    def of(cls, model: HiddenStateGPTModel) -> Rooms:
        """They go where the model goes."""
        if not hasattr(model, "kept_rooms"):
            model.kept_rooms = cls()
        return model.kept_rooms

    def take(self, components: Sequence[MixtureComponent], sampler: Sampler, rows: int, columns: Sequence[int]) -> Room:
        """One that serves, or a new one, for which those that it replaces make room."""
        needs = components, sampler, rows, columns
        found = next((room for room in self.free if room.serves(*needs)), None)
        if found:
            self.free.remove(found)
            return found
        here = addresses(components)
        self.free = [room for room in self.free if (room.rows, choice(room.sampler)) != (rows, choice(sampler)) and room.addresses == here]
        return Room(components, sampler, rows, [aligned(width, KEPT_COLUMNS) for width in columns])

    def give_back(self, room: Room, stages: int) -> None:
        """Its rows have ended."""
        self.free = [*self.free, room][-KEPT_ROOMS * stages :]


def choice(sampler: Sampler) -> tuple[Sampling, list[float]]:
    """What of a sampler is captured; seeds are in the rows' streams, limits with the rows."""
    return replace(sampler.sampling, seed=0, max_new_tokens=1), sampler.shares


def addresses(components: Sequence[MixtureComponent]) -> list[int]:
    """Where all weights are."""
    return [param.data_ptr() for component in components for param in component.model.parameters()]
