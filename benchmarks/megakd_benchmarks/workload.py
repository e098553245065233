"""What is measured, the same for every system: random models, global batches of prompts, and where each response ends.

Every row carries a response. Its length is where the rollout of that row ends, in every system; its tokens are what losses are
then computed on, so that systems with other random numbers still do the same work.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils.logging import disable_progress_bar

from megakd.config import BenchmarkConfig, PromptKDConfig
from megakd.data.batch import Sample
from megakd.data.dataloader import DataLoader
from megakd.data.sft_dataset import SFTDataset
from megakd.data.tokenizer import load_tokenizer
from megakd.errors import UserError
from megakd.reporting.flops import FORWARD, FROZEN_WITH_GRADIENT, TRAINING, TransformerSizes, forward_flops_per_token

disable_progress_bar()
GPT2_VOCABULARY = 50257
HEAD_SIZE = 64
CONTEXT = 1024
STUDENT_PASSES = FORWARD + FORWARD + TRAINING  # rollout, as a constant in the prompt's loss, learning
TEACHER_PASSES = FORWARD + FROZEN_WITH_GRADIENT + FORWARD  # without a prompt, under the learning prompt, under the new prompt
MODEL_CALLS = {"student": 2, "teacher": 3}  # forward calls of an iteration that read whole rows; the rollout is not one


@dataclass(frozen=True)
class Workload:
    """`repetitions` + 1 global batches, the same for every system."""

    batches: tuple[tuple[Sample, ...], ...]  # the first is for the check of equality
    prompt_ids: tuple[int, ...]  # the soft prompt begins as their embeddings
    vocab_size: int
    source: str  # where rows come from, for people

    @property
    def first(self) -> tuple[Sample, ...]:
        """The batch on which systems are compared; it warms them up and is not timed."""
        return self.batches[0]


def make_workload(config: BenchmarkConfig) -> Workload:
    """`repetitions` + 1 global batches, from --data or drawn.

    Raises:
        UserError: the data or the tokenizer do not fit.
    """
    rows, prompt_ids, vocab_size = read_rows(config) if config.data else draw_rows(config)
    rows = [replace(row, response=row.response[: config.max_new_tokens]) for row in rows]
    loader = DataLoader(rows, global_batch_size=config.global_batch_size, seed=config.seed)
    batches = tuple(tuple(loader.global_samples(i)) for i in range(config.repetitions + 1))
    return Workload(batches, tuple(prompt_ids), vocab_size, Path(config.data).name if config.data else "drawn lengths")


def read_rows(config: BenchmarkConfig) -> tuple[Sequence[Sample], list[int], int]:
    """Rows of a jsonl with prompts and right answers, the soft prompt's tokens, and the vocabulary's size."""
    tokenizer = load_tokenizer(config.tokenizer)
    rows = SFTDataset(config.data, tokenizer, max_length=config.max_length, max_prompt_length=config.max_prompt_length)
    vocab_size = config.vocab_size or len(tokenizer)
    if vocab_size < len(tokenizer):
        raise UserError(
            f"--vocab-size {vocab_size} is less than the {len(tokenizer)} tokens of --tokenizer {config.tokenizer}; raise it"
        )
    settings = PromptKDConfig()
    ids = tokenizer.encode(settings.prompt_init_text, add_special_tokens=False)
    return [rows[i] for i in range(len(rows))], (ids * settings.prompt_len)[: settings.prompt_len], vocab_size


def draw_rows(config: BenchmarkConfig) -> tuple[Sequence[Sample], list[int], int]:
    """Random tokens in rows about as long as Dolly's: many short, few long."""
    rng, vocab_size = random.Random(config.seed), config.vocab_size or GPT2_VOCABULARY
    draw = lambda count: tuple(rng.randrange(vocab_size) for _ in range(count))

    def length(median: float, spread: float, most: int) -> int:
        return max(2, min(most, round(rng.lognormvariate(0, spread) * median * config.max_length / 512)))

    def row(i: int) -> Sample:
        return Sample(i, draw(length(55, 0.6, config.max_prompt_length)), draw(length(38, 1.1, config.max_new_tokens)))

    rows = [row(i) for i in range(4 * config.global_batch_size)]
    return rows, list(draw(PromptKDConfig().prompt_len)), vocab_size


# ---- models


def gpt2_config(layers: int, hidden: int, vocab_size: int) -> GPT2Config:
    """GPT-2 of this size, without dropout: systems draw other random numbers."""
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    specials = {"bos_token_id": vocab_size - 1, "eos_token_id": vocab_size - 1}
    sizes = {"n_positions": CONTEXT, "n_embd": hidden, "n_layer": layers, "n_head": max(1, hidden // HEAD_SIZE)}
    return GPT2Config(vocab_size=vocab_size, **sizes, **specials, **dropouts)


def model_configs(config: BenchmarkConfig, workload: Workload) -> dict[str, GPT2Config]:
    """Of `student` and `teacher`."""
    return {name: gpt2_config(*size, workload.vocab_size) for name, size in config.sizes.items()}


def write_models(configs: dict[str, GPT2Config], folder: Path) -> None:
    """Hugging Face folders `student` and `teacher` with random weights, which every system loads."""
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(folder / name)


# ---- how much work it is


def flops_of_iteration(configs: dict[str, GPT2Config], batch: Sequence[Sample]) -> float:
    """What an iteration needs, whoever does it: real positions alone, heads at the positions that predict the response."""
    passes = {"student": STUDENT_PASSES, "teacher": TEACHER_PASSES}
    return sum(passes[name] * sum(_forward_flops(_sizes_of(config), row) for row in batch) for name, config in configs.items())


def _forward_flops(sizes: TransformerSizes, row: Sample) -> float:
    body = row.num_positions * forward_flops_per_token(sizes, row.num_positions, with_head=False)
    return body + len(row.response) * 2 * sizes.hidden_size * sizes.vocab_size


def _sizes_of(config: GPT2Config) -> TransformerSizes:
    return TransformerSizes(
        num_layers=config.n_layer,
        hidden_size=config.n_embd,
        ffn_hidden_size=4 * config.n_embd,
        num_attention_heads=config.n_head,
        num_query_groups=config.n_head,
        head_dim=config.n_embd // config.n_head,
        vocab_size=config.vocab_size,
    )


def positions(batch: Sequence[Sample]) -> int:
    """Real input positions of a global batch."""
    return sum(row.num_positions for row in batch)


class PositionCounter:
    """Token positions that models were called on, padding included; `watch` a model, and take `share` after an iteration."""

    def __init__(self) -> None:
        self.computed, self.watching = 0, True

    def watch(self, model: torch.nn.Module) -> None:
        """Count the calls of `model` from now on, except while `watching` is False."""
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model, args, kwargs) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")  # none: PEFT hands embeddings to its base model
        if self.watching and tokens is not None:
            self.computed += tokens.numel()

    def share(self, batch: Sequence[Sample]) -> float:
        """Real positions of this replica's rows over computed ones since the last call."""
        computed, self.computed = self.computed, 0
        return sum(MODEL_CALLS.values()) * positions(batch) / computed
