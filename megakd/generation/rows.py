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
from megakd.generation.decoder import Decoder
from megakd.generation.sampling import NO_TOKEN, Sampler, Sampling, noise_streams
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.model_provider import context_length

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


@dataclass(frozen=True)
class MixtureComponent:
    """One model of the mixture Σ share · softmax(z / T) that next tokens are drawn from; the shares of all components sum to 1."""

    model: HiddenStateGPTModel
    share: float = 1.0
    soft_prompt: Tensor | None = None  # [P, H], before every prompt, for this model alone
    prompts: Sequence[Sequence[int]] | None = None  # what it reads in place of the prompts that all are given, one for each of them

    @property
    def context(self) -> int:
        """Positions that its model can be given."""
        return context_length(self.model.hf_config)

    @property
    def soft_length(self) -> int:
        """Positions that its soft prompt takes."""
        return 0 if self.soft_prompt is None else len(self.soft_prompt)


def is_capturable(device: torch.device, sampling: Sampling) -> bool:
    """Limits of repetition look back at a history that grows, so their step has no fixed shape."""
    return device.type == "cuda" and not sampling.limits_repetition


class RowGroup:
    """Rows in the order longest prompt first.

    On a GPU the decode step is captured as a CUDA graph: it attends to the whole cache, and rows leave when half of them are
    finished, because each number of rows is another graph. Its tokens stay on the device and are looked at every few steps, on all
    stages after the same ones: what a row was given after its end is left out, and the GPU seldom waits.
    """

    def __init__(self, rows: list[Row], components: Sequence[MixtureComponent], sampler: Sampler):
        self.rows, self.sampler, self.layout = rows, sampler, components[0].model.layout
        self.longest, read = max(row.limit for row in rows), zip(components, zip(*(row.prompts for row in rows)))
        self.decoders = [Decoder(component.model, prompts, self.longest, component.soft_prompt) for component, prompts in read]
        self.device = self.decoders[0].device
        self.streams_B = noise_streams(sampler.sampling.seed, [row.sample_id for row in rows], self.device)
        self.seen_BK = self._prompts(0)
        self.read = 0  # response tokens that this stage has read
        self.unseen: list[Tensor] = []  # [B] each, read since the last ones came to the host
        self.prefilled = self.finished = False
        self.captures = is_capturable(self.device, sampler.sampling) and all(decoder.has_fixed_steps for decoder in self.decoders)
        self.captured: CapturedStep | None = None

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
        return self._sample(states, torch.zeros((), dtype=torch.int64, device=self.device))

    def _prompts(self, component: int) -> Tensor:
        """[B, W] of what it reads, its padding, on the left, -1."""
        width = self.decoders[component].width
        read = [row.prompts[component] for row in self.rows]
        return torch.tensor([[-1] * (width - len(prompt)) + list(prompt) for prompt in read], device=self.device)

    def step(self, *inputs: Tensor) -> list[Tensor]:
        """`decode`, captured where it can be."""
        if not self.captures:
            return self.decode(*inputs)
        if self.captured is None:
            self.captured = CapturedStep(self.decode, *inputs)
        return self.captured(*inputs)

    def decode(self, tokens_B: Tensor, step: Tensor, *hidden: Tensor) -> list[Tensor]:
        """The `step`-th tokens of the responses, or their hidden states: hidden states, or on the last stage the next tokens."""
        filled = [None if self.captures else decoder.width + self.read for decoder in self.decoders]
        stages = zip(self.decoders, filled, *([hidden] if hidden else []))
        return self._sample([decoder.decode(tokens_B, step, *rest) for decoder, *rest in stages], step + 1)

    def _sample(self, states: list[Tensor], position: Tensor) -> list[Tensor]:
        if not self.layout.is_last_stage:
            return states
        return [self.sampler(states, self.streams_B, position, self.seen_BK)]

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

    def drop_finished(self) -> slice | list[int]:
        """Let finished rows leave; returns where the rows that stay were before."""
        live = [i for i, row in enumerate(self.rows) if not row.finished]
        if len(live) == len(self.rows) or (self.captures and 2 * len(live) > len(self.rows)):
            return slice(None)
        gaps = [i for i in range(len(live)) if self.rows[i].finished]
        movers = [i for i in live if i >= len(live)]
        order = list(range(len(live)))
        for gap, mover in zip(gaps, movers):
            order[gap] = mover
        for decoder in self.decoders:
            decoder.keep(order, movers, gaps, decoder.width + self.read)
        self.captured = None
        self.rows = [self.rows[i] for i in order]
        self.streams_B, self.seen_BK = self.streams_B[order], self.seen_BK[order]
        return order
