"""A model answers many prompts: each data-parallel replica its share, and every rank gets all answers, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

from megakd.config import ResponseConfig
from megakd.data.batch import Sample
from megakd.data.dataloader import deal
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.models.gpt_model import HiddenStateGPTModel

BATCHES_PER_CHUNK = 4  # enough rows to sort by length; few enough to see progress, and to lose little when a run is cut off

Item = TypeVar("Item")


def sampling_of(settings: ResponseConfig, seed: int) -> Sampling:
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        greedy=settings.greedy,
        seed=seed,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
    )


def chunk_size(model: HiddenStateGPTModel, batch_size: int) -> int:
    """Rows answered between two signs of life, over all replicas."""
    return BATCHES_PER_CHUNK * batch_size * model.layout.dp_size


def answer(
    model: HiddenStateGPTModel, samples: Sequence[Sample], sampling: Sampling, *, eos_id: int, batch_size: int
) -> Iterator[list[list[int]]]:
    """Responses chunk by chunk, in the order of `samples`, on every rank. A sample's own response is not looked at."""
    step = chunk_size(model, batch_size)
    for first in range(0, len(samples), step):
        yield answer_chunk(model, samples[first : first + step], sampling, eos_id=eos_id, batch_size=batch_size)


def answer_chunk(model, samples: Sequence[Sample], sampling: Sampling, *, eos_id: int, batch_size: int) -> list[list[int]]:
    """One chunk, dealt to the replicas so that each has as many rows and about as long prompts."""
    layout = model.layout
    numbered = [Sample(i, sample.prompt, ()) for i, sample in enumerate(samples)]  # sample ids may repeat or have gaps
    mine = [sample.sample_id for sample in deal(numbered, layout.dp_size)[layout.dp_rank]]
    prompts, ids = [samples[i].prompt for i in mine], [samples[i].sample_id for i in mine]
    responses = generate(model, prompts, ids, sampling, eos_id=eos_id, batch_size=batch_size)
    gathered = gather_by_index(dict(zip(mine, responses)), layout.dp_group)
    return [gathered[i] for i in range(len(samples))]


def gather_by_index(mine: dict[int, Item], group: dist.ProcessGroup) -> dict[int, Item]:
    """Every rank's entries on every rank."""
    parts: list[dict[int, Item]] = [{} for _ in range(group.size())]
    dist.all_gather_object(parts, mine, group=group)
    return {index: item for part in parts for index, item in part.items()}
