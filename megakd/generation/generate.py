"""Responses of a model to prompts, over tensor, pipeline and data parallel ranks.

Prompts are sorted by length and cut into groups of like lengths, so that little of a group is padding. A group's prompts are read
at once (prefill), then it grows by one token a step; rows that have ended leave it, and waiting ones take their places. Under pipeline
parallelism as many groups are under way as there are stages (ring.py). The model is that of training, its weights and its forward
pass; its mode and its sequence parallelism are put back at the end.

A response ends with an EOS, after `max_new_tokens`, or where its row reaches the model's context (`max_position_embeddings`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Sequence
from functools import partial
from itertools import pairwise

import torch
from megakd_kernels import VocabShard
from torch import Tensor

from megakd.errors import UserError
from megakd.generation.mixture import MixtureComponent
from megakd.generation.ring import run_pipeline_ring
from megakd.generation.rows import Row, RowGroup
from megakd.generation.sampling import NO_TOKEN, Sampler, Sampling
from megakd.models.decoding import decoding
from megakd.models.gpt_model import HiddenStateGPTModel


@torch.inference_mode()
def generate(
    model: HiddenStateGPTModel,
    prompts: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    sampling: Sampling,
    *,
    eos_id: int | Collection[int],
    batch_size: int | None = None,
    soft_prompt: Tensor | None = None,
    mix_with: Sequence[MixtureComponent] = (),
    limits: Sequence[int] | None = None,
    generations: Sequence[int] | None = None,
) -> list[list[int]]:
    """Token ids of the responses in the prompts' order, the EOS included where one was sampled; the same on every rank of the model.

    The ranks of one model replica pass the same arguments; data-parallel replicas pass their own prompts, any number of them.

    Args:
        prompts: token ids, at least one each.
        sample_ids: one integer a prompt, which picks its noise; two prompts with one id draw from the same noise.
        eos_id: ends a response; of several each does, as eos_token_id of transformers.
        batch_size: most rows under way at once, None for all: the cache holds as many.
        soft_prompt: [P, H], stands before every prompt and takes positions 0..P-1.
        mix_with: further models, of the same layout and vocabulary, whose next-token distributions are mixed in by their shares;
            `model` has the rest. MiniLLM's (1 - α) q + α p is `mix_with=[MixtureComponent(teacher, α)]`. Each may read other prompts.
        limits: most response tokens of each row, below `max_new_tokens`.
        generations: which answer to its prompt each is, from 0 on: each draws from noise of its own. Neighbours with one prompt, as
            these are, read it once.

    Raises:
        ValueError: an empty prompt, one that leaves no room for a response, or models that do not go together.
        UserError: a model's logits are NaN or infinite.
    """
    components = [MixtureComponent(model, 1 - sum(component.share for component in mix_with), soft_prompt), *mix_with]
    check_components(components)
    limits, generations = limits or [sampling.max_new_tokens] * len(prompts), generations or [0] * len(prompts)
    ends = frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
    read = zip(*(prompts if component.prompts is None else component.prompts for component in components), strict=True)
    rows = [
        Row(of_row, sample_id, min(limit, sampling.max_new_tokens, room(i, of_row, components)), ends, generation)
        for i, (of_row, sample_id, limit, generation) in enumerate(zip(read, sample_ids, limits, generations))
    ]
    sampler = make_sampler(sampling, components)
    groups, waiting = split_by_length(rows, model.layout.pp_size, batch_size)
    with decoding([component.model for component in components]):
        run_pipeline_ring(iter([partial(RowGroup, group, components, sampler, waiting) for group in groups]), model.layout)
    check_chosen(rows)
    return [row.response for row in rows]


def room(i: int, prompts: Sequence[Sequence[int]], components: Sequence[MixtureComponent]) -> int:
    """Tokens that fit behind what each component reads of row `i`.

    Raises:
        ValueError: none do, or there is no prompt.
    """
    if not all(map(len, prompts)):
        raise ValueError(f"prompt {i} has no tokens; begin it with BOS or EOS")
    rooms = [component.context - component.soft_length - len(prompt) for component, prompt in zip(components, prompts)]
    least = min(range(len(rooms)), key=rooms.__getitem__)
    left, component, prompt = rooms[least], components[least], prompts[least]
    if left < 1:
        raise ValueError(
            f"prompt {i} has {len(prompt)} tokens and the soft prompt {component.soft_length}: no room for a response in the model's "
            f"context of {component.context} (max_position_embeddings); cut prompts to {len(prompt) + left - 1} tokens or fewer"
        )
    return left


def check_chosen(rows: Sequence[Row]) -> None:
    """Every token of every response was one. Looked at when all rows have ended, on every stage alike.

    Raises:
        UserError: logits were no numbers.
    """
    for row in rows:
        if NO_TOKEN in row.response[-1:]:
            raise UserError(
                f"the next token of sample {row.sample_id}, after {len(row.prompt)} of its prompt and {len(row.response) - 1} of its "
                "response, cannot be chosen: its logits are NaN or infinite; look for NaN in the model's weights, or use --dtype fp32"
            )


def check_components(components: Sequence[MixtureComponent]) -> None:
    """Models that are mixed hold the same vocabulary columns on the same ranks.

    Raises:
        ValueError: they do not, or the shares are no distribution.
    """
    first = components[0]
    if not all(0 < component.share <= 1 for component in components):
        raise ValueError(f"shares {[component.share for component in components]} of the mixed models: each must be above 0, with sum 1")
    for component in components[1:]:
        ours, theirs = ((v.model.layout.tp_size, v.model.layout.pp_size) for v in (first, component))
        if ours != theirs:
            raise ValueError(
                f"a model at TP {theirs[0]} × PP {theirs[1]} cannot be mixed with one at TP {ours[0]} × PP {ours[1]}: "
                "they sample together, so give both the same layout"
            )
        if component.model.real_vocab_size != first.model.real_vocab_size or component.model.vocab_size != first.model.vocab_size:
            raise ValueError(
                f"vocabularies of {first.model.real_vocab_size} and {component.model.real_vocab_size} tokens cannot be mixed; "
                "use models with one tokenizer and one padded width"
            )


def make_sampler(sampling: Sampling, components: Sequence[MixtureComponent]) -> Sampler:
    """For the vocabulary columns of this rank, padding among them."""
    model = components[0].model
    layout, columns = model.layout, model.vocab_size // model.layout.tp_size
    shard = VocabShard(model.real_vocab_size, tp_group=layout.tp_group)
    return Sampler(sampling, shard, [component.share for component in components], columns, next(model.parameters()).device)


def split_by_length(rows: Sequence[Row], stages: int, batch_size: int | None) -> tuple[list[list[Row]], deque[Row]]:
    """Groups of like lengths and even sizes, one a stage, and the rows that wait. Longest prompt first: what takes most memory and time is
    not left for the end."""
    ordered = deque(sorted(rows, key=lambda row: len(row.prompt), reverse=True))
    under_way = min(math.ceil((batch_size or len(rows)) / stages) * stages, len(rows))
    count = min(stages, under_way)
    bounds = [under_way * i // count for i in range(count + 1)] if count else []
    return [[ordered.popleft() for _ in range(hi - lo)] for lo, hi in pairwise(bounds)], ordered
