"""Where the heads of a model look while it reads questions, per layer and head; a base model beside the students that began as it.

    a_qk           attention of query q to key k <= q: sum_k a_qk = 1
    entropy_LH     mean over the queries of -sum_k a_qk log a_qk        nats: 0 one key alone, log(q + 1) all of them alike
    mass_LH        mean over the queries of sum_k a_qk over the keys k that are tokens of the question's numbers

N questions, L layers, H heads, S positions. Queries are the positions of the question, or those that predict the answer. Attention is
that of transformers' own models (attn_implementation "eager"), sums are taken in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.native import is_native
from megakd.config import AttentionConfig
from megakd.data.batch import PADDING, Sample
from megakd.data.prompt_dataset import PromptDataset
from megakd.data.tokenizer import check_same_tokenizer
from megakd.errors import UserError
from megakd.evaluation.attention_report import check_folder, print_report, summary, write_report
from megakd.evaluation.evaluation_set import EvaluationSet, NamedPath, named_paths
from megakd.evaluation.gsm8k import NUMBER
from megakd.models.hf_checkpoint import ADAPTER
from megakd.runtime.initialize import resolve_dtype

QUESTIONS = ("question", "instruction", "prompt", "messages", "text")  # fields of a record, the plainest first


@dataclass(frozen=True)
class Reading:
    """What a model reads of one row, and what is asked of its attention."""

    tokens: tuple[int, ...]  # prompt, and the answer where its queries are looked at
    queries: tuple[int, ...]  # positions
    numbers: tuple[int, ...]  # positions of the tokens of the question's numbers


@dataclass(frozen=True)
class HeadStatistics:
    """Of one model, a question at a time."""

    entropy_NLH: np.ndarray
    mass_NLH: np.ndarray


def analyze_attention(config: AttentionConfig) -> dict[str, Any]:
    """The summary (`attention_report.summary`) of all models; with --save also attention.json and figures.

    Raises:
        UserError: something does not fit; before any weight is loaded where that can be known.
    """
    config.check()
    check_folder(config)
    named = named_paths(config.model, flag="--model")
    folders = open_models(named)
    readings = read_questions(config, folders[0].tokenizer)
    measured = {one.name: measure(one.path, readings, config) for one in named}
    results = summary(config, measured, [len(reading.numbers) for reading in readings])
    write_report(config, results)
    print_report(results)
    return results


def open_models(named: Sequence[NamedPath]) -> list[ModelFolder]:
    """Raises UserError where a folder is no Hugging Face folder, or its heads cannot stand beside those of the first."""
    folders = []
    for one in named:
        if is_native(Path(one.path)):
            way_out = "turn it into a Hugging Face folder with checkpoint_tools/mp_to_hf.py"
            raise UserError(f"--model {one.path} is a native checkpoint; {way_out}")
        if (Path(one.path) / ADAPTER).is_file():
            raise UserError(f"--model {one.path} holds adapters, and whole models are compared; export the run with --merge-lora")
        folders.append(ModelFolder.open(one.path))
    base = folders[0]
    for folder in folders[1:]:
        if heads_of(folder) != heads_of(base):
            raise UserError(
                f"--model {folder.path} has {heads_of(folder)} layers and heads, {base.path} {heads_of(base)}, and each is compared with "
                "its like; give the base that the student began as"
            )
        check_same_tokenizer(folder.tokenizer, base.tokenizer)
    return folders


def heads_of(folder: ModelFolder) -> tuple[int, int]:
    """Layers, and heads of a layer."""
    return folder.config.num_hidden_layers, folder.config.num_attention_heads


# ---- questions


def read_questions(config: AttentionConfig, tokenizer: PreTrainedTokenizerBase) -> list[Reading]:
    """The first `samples` questions that hold a number.

    Raises:
        UserError: the file cannot be used, or no question holds one.
    """
    options = {"max_prompt_length": config.max_prompt_length, "template": config.prompt_template}
    if config.queries == "answer":
        data = EvaluationSet("data", config.data, tokenizer, max_response_length=config.max_answer_length, **options)
    else:
        data = PromptDataset(config.data, tokenizer, **options)
    readings = []
    for i, sample in enumerate(data):
        first, end = question_span(data.prompt_text(i), data.fields(i))
        reading = reading_of(sample, token_spans(data.prompt_text(i), sample, tokenizer), data.prompt_text(i), first, end)
        readings += [reading] if reading.numbers else []
        if len(readings) == config.samples:
            break
    if not readings:
        raise UserError(f"--data {config.data}: no question holds a number in digits; give questions such as GSM8K's")
    return readings


def question_span(prompt: str, fields: dict) -> tuple[int, int]:
    """Where the record's own question stands in the rendered prompt: numbers of a template are none of the question's."""
    asked = next(fields[name] for name in QUESTIONS if name in fields)
    if isinstance(asked, list):
        asked = next((turn["content"] for turn in reversed(asked) if turn.get("role") == "user"), "")
    first = prompt.rfind(asked.strip()) if isinstance(asked, str) and asked.strip() else -1
    return (first, first + len(asked.strip())) if first >= 0 else (0, len(prompt))


def token_spans(prompt: str, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """First and last character of each of the prompt's tokens.

    Raises:
        UserError: the tokenizer cannot tell.
    """
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer does not say where a token stands in a text; it needs a tokenizer.json")
    return tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][: len(sample.prompt)]


def reading_of(sample: Sample, spans: Sequence[tuple[int, int]], prompt: str, first: int, end: int) -> Reading:
    """The queries are the tokens of the question or, where there is an answer, those that predict it."""
    inside = partial(overlapping, spans)
    numbers = {i for found in NUMBER.finditer(prompt, first, end) for i in inside(found.start(), found.end())}
    tokens = (*sample.prompt, *sample.response[:-1])
    queries = range(len(sample.prompt) - 1, len(tokens)) if sample.response else inside(first, end)
    return Reading(tokens, tuple(queries), tuple(sorted(numbers)))


def overlapping(spans: Sequence[tuple[int, int]], first: int, end: int) -> list[int]:
    """The tokens that hold a character from `first` to before `end`."""
    return [i for i, (begins, ends) in enumerate(spans) if begins < end and ends > first]


# ---- attention


@torch.inference_mode()
def measure(folder: str, readings: Sequence[Reading], config: AttentionConfig) -> HeadStatistics:
    """One model's, over all questions."""
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = resolve_dtype(config.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype, local_files_only=True).to(device).eval()
    batches = [readings[i : i + config.batch_size] for i in range(0, len(readings), config.batch_size)]
    entropy, mass = zip(*(pair for rows in batches for pair in statistics_of(model, rows)))
    return HeadStatistics(np.stack(entropy), np.stack(mass))


def statistics_of(model: PreTrainedModel, rows: Sequence[Reading]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Entropy and mass [L, H] of each row: one forward pass, rows padded on the right, where no query looks."""
    length = max(len(row.tokens) for row in rows)
    tokens_BS = torch.tensor([[*row.tokens, *[PADDING] * (length - len(row.tokens))] for row in rows], device=model.device)
    attentions = model(input_ids=tokens_BS, attention_mask=torch.ones_like(tokens_BS), output_attentions=True, use_cache=False).attentions
    for b, row in enumerate(rows):
        pairs = [head_statistics(attention_BHSS[b], row) for attention_BHSS in attentions]
        yield tuple(torch.stack(values).cpu().numpy() for values in zip(*pairs))


def head_statistics(attention_HSS: Tensor, row: Reading) -> tuple[Tensor, Tensor]:
    """Entropy [H] and mass [H] of one layer and question."""
    attention_HQS = attention_HSS[:, list(row.queries)].double()
    entropy_H = torch.special.entr(attention_HQS).sum(-1).mean(-1)
    return entropy_H, attention_HQS[..., list(row.numbers)].sum(-1).mean(-1)
