"""A model answers many prompts: each data-parallel replica its share, and every rank gets all answers, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.soft_prompt_folder import SoftPromptFolder
from megakd.config import AnsweringConfig, ResponseConfig
from megakd.data.batch import Sample
from megakd.data.dataloader import split_across_dp
from megakd.data.end_ids import EndIds
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.loading import AS_THE_STUDENT, ModelFolders, check_context
from megakd.models.gpt_model import HiddenStateGPTModel

BATCHES_PER_CHUNK = 4  # enough rows to sort by length; few enough to see progress, and to lose little when a run is cut off

Item = TypeVar("Item")


def open_folders(config: AnsweringConfig, teacher_model: str = "", teacher_cache: str = "") -> ModelFolders:
    """The model that answers and, where one is named, the teacher or its store.

    Raises:
        UserError: a folder, the layout, the tokenizers or the lengths do not fit.
    """
    folders = ModelFolders.open(config.model, {"": teacher_model} if teacher_model else {}, teacher_cache)
    if config.soft_prompt:
        folders = replace(folders, student=behind(config.soft_prompt, folders.student))
    folders.check(config.parallel, getattr(config, "teacher_layout", AS_THE_STUDENT))
    prompt, response = config.responses.max_prompt_length, config.responses.max_new_tokens
    bos = int(getattr(config, "add_bos", False))
    said = f"--max-prompt-length {prompt}{' + 1 of --add-bos' if bos else ''} + --max-new-tokens {response}"
    for folder in folders:
        soft = folder.soft_prompt_len
        also = f" behind the {soft} vectors of --soft-prompt" if soft else ""
        check_context(folder, prompt + response, bos + soft, said + also, "lower their sum to {}")
    return folders


def behind(soft_prompt: str, model: ModelFolder) -> ModelFolder:
    """The same model with what stands before every text.

    Raises:
        UserError: there is no soft prompt, or it is another model's.
    """
    found = SoftPromptFolder.read(soft_prompt)
    found.check(model)
    return replace(model, soft_prompt=found.vectors)


def sampling_of(settings: ResponseConfig, seed: int) -> Sampling:
    """One pass over the prompts: the settings are those of all passes, the seed its own."""
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        greedy=settings.greedy,
        seed=seed,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
    )


@dataclass(frozen=True)
class Writer:
    """A model that answers, `batch_size` rows at once on each replica."""

    model: HiddenStateGPTModel
    ends: EndIds
    batch_size: int
    soft_prompt: Tensor | None = None  # [P, H], before every prompt

    @classmethod
    def of(cls, folder: ModelFolder, model: HiddenStateGPTModel, batch_size: int) -> Writer:
        """The `model` that was loaded of `folder`."""
        soft_prompt = None if folder.soft_prompt is None else folder.soft_prompt.to(model.layout.device)
        return cls(model, folder.ends, batch_size, soft_prompt)

    @property
    def chunk_size(self) -> int:
        """Rows answered between two signs of life, over all replicas."""
        return BATCHES_PER_CHUNK * self.batch_size * self.model.layout.dp_size

    def answer(self, samples: Sequence[Sample], sampling: Sampling) -> Iterator[list[list[int]]]:
        """Responses chunk by chunk, in the order of `samples`, on every rank. A sample's own response is not looked at."""
        for first in range(0, len(samples), self.chunk_size):
            yield self._answer_chunk(samples[first : first + self.chunk_size], sampling)

    def _answer_chunk(self, samples: Sequence[Sample], sampling: Sampling) -> list[list[int]]:
        """One chunk, dealt to the replicas so that each has as many rows and about as long prompts."""
        layout = self.model.layout
        numbered = [Sample(i, sample.prompt, ()) for i, sample in enumerate(samples)]  # sample ids may begin anywhere
        mine = [sample.sample_id for sample in split_across_dp(numbered, layout.dp_size)[layout.dp_rank]]
        prompts, ids = [samples[i].prompt for i in mine], [samples[i].sample_id for i in mine]
        options = {"eos_id": self.ends.stop, "batch_size": self.batch_size, "soft_prompt": self.soft_prompt}
        responses = generate(self.model, prompts, ids, sampling, **options)
        gathered = gather_by_index(dict(zip(mine, responses)), layout.dp_group)
        return [gathered[i] for i in range(len(samples))]


def gather_by_index(mine: dict[int, Item], group: dist.ProcessGroup) -> dict[int, Item]:
    """Every rank's entries on every rank."""
    parts: list[dict[int, Item]] = [{} for _ in range(group.size())]
    dist.all_gather_object(parts, mine, group=group)
    return {index: item for part in parts for index, item in part.items()}


def hidden_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Special tokens, which `response_text` does not show."""
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
