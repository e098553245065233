"""What a run learns, and what it is evaluated on: rows as its method reads them, each with its teacher where there are several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megakd.config import Config
from megakd.data.batch import Sample
from megakd.data.conditioning import Conditioning
from megakd.data.dataloader import DataLoader
from megakd.data.open_data import open_prompts, open_responses
from megakd.data.routing import RoutedData
from megakd.data.sft_dataset import NO_RESPONSE
from megakd.data.shown import as_read
from megakd.errors import UserError
from megakd.loading import ModelFolders
from megakd.methods import METHODS
from megakd.runtime.initialize import is_rank_zero
from megakd.runtime.parallel_layout import ParallelLayout

HELD_OUT = "--valid-data is for the loss on it; give one, or leave --valid-data out"  # said of a row without a response


@dataclass(frozen=True)
class RunData:
    """What a run learns, beside that what its method learns as text (MiniLLM), and what it is evaluated on."""

    loader: DataLoader
    text: DataLoader | None = None
    valid: Sequence[Sample] | None = None

    @classmethod
    def open(cls, config: Config, folders: ModelFolders, layout: ParallelLayout) -> RunData:
        """
        Raises:
            UserError: a file cannot be read, or does not hold what the method needs; a row is not in the teacher's store.
        """
        data, method, tokenizer = config.data, METHODS[config.method], folders.student.tokenizer
        conditioning = folders.conditioning(
            config.conditioning,
            template=data.prompt_template,
            taken=config.page.soft_prompt_len,
            new_tokens=config.max_new_tokens if method.answers_prompts(config) else 0,
        )
        loader = DataLoader(
            routed(open_training_rows(config, tokenizer, conditioning), config),
            global_batch_size=config.training.global_batch_size,
            seed=config.training.seed,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
            num_generations=config.generation.num_generations,
        )
        text = method.open_text(config, tokenizer, layout, conditioning)
        options = {"conditioning": conditioning, "no_response": HELD_OUT}
        valid = routed(open_responses(data.valid_data, tokenizer, data, **options), config) if data.valid_data else None
        for rows in filter(None, (loader.dataset, valid)) if folders.store else ():
            folders.store.check_texts(rows, where=rows.where)
        return cls(loader, text, valid)

    def show(self, count: int, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
        """Print the first rows as they are read, on rank 0."""
        written = f"what the {'teacher' if config.method == 'seqkd' else 'student'} writes, {config.max_new_tokens} tokens at most"
        rows = self.loader.dataset
        if is_rank_zero():
            for i in range(min(count, len(rows))):
                options = {"where": rows.where(i), "written": written, "has_teacher": config.needs_teacher}
                print(as_read(rows[i], tokenizer, **options), flush=True)


def open_training_rows(
    config: Config, tokenizer: PreTrainedTokenizerBase, conditioning: Conditioning | None = None
) -> Sequence[Sample]:
    """--train-data as the method reads it.

    Raises:
        UserError: a row lacks the prompt or the response that it learns.
    """
    data, method = config.data, METHODS[config.method]
    if not method.reads_responses(config):
        return open_prompts(data.train_data, tokenizer, data, conditioning=conditioning)
    rows = open_responses(data.train_data, tokenizer, data, conditioning=conditioning, no_response=no_response(config))
    if method.needs_prompts(config):
        check_prompts(rows, config)
    return rows


def routed(rows: Sequence[Sample], config: Config) -> Sequence[Sample]:
    """Each with its teacher, where there are several.

    Raises:
        UserError: a row names none of them.
    """
    names = config.models.named_teachers
    return RoutedData(rows, config.teacher.teacher_field, names) if names else rows


def no_response(config: Config) -> str:
    """What is said of a row without one that the method learns."""
    return config.page.no_response(NO_RESPONSE)


def check_prompts(dataset: Sequence[Sample], config: Config) -> None:
    """A student that answers the data's prompts, be it now and then, needs one in every row; so do losses on prompts.

    Raises:
        UserError: a row of plain text.
    """
    plain = next((i for i, sample in enumerate(dataset) if not sample.prompt), None)
    if plain is not None:
        raise UserError(
            f"{dataset.where(plain)} has no prompt, which --method {config.method} needs; give data with prompts{config.page.no_prompt}"
        )
