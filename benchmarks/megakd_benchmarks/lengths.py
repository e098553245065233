"""Peak memory of a training iteration by the length of its rows: a whole iteration of a method, in a process of its own.

Llama of random weights; of every row the first tokens are the prompt and the others the response, all of which are learnt. Nothing is
written by the student: the cache of a rollout is reckoned by --dry-run.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from transformers import LlamaConfig

from megakd.config import Config, ParallelConfig, TrainingConfig
from megakd.data.batch import Sample
from megakd.data.end_ids import EndIds
from megakd.loading import align_vocabularies, start
from megakd.methods import METHODS
from megakd.methods.base import MethodInputs
from megakd.methods.promptkd import PromptKD
from megakd.models.model_provider import build_model
from megakd.optimizer import StudentOptimizer
from megakd.teachers.live import LiveTeacher
from megakd_benchmarks.measuring import MIB, memory
from megakd_benchmarks.megakd_system import PromptTokens

PROMPT, TOTAL_ITERS, HEAD_SIZE = 32, 1000, 64


@dataclass(frozen=True)
class Case:
    """An iteration on one micro-batch."""

    method: str
    lengths: tuple[int, ...]  # positions of its rows
    pack: bool = False
    recompute: bool = False
    student: tuple[int, int] = (2, 128)  # layers, hidden size
    teacher: tuple[int, int] = (2, 192)
    vocabulary: int = 32_000

    @property
    def name(self) -> str:
        """For people."""
        rows = f", {len(self.lengths)} rows {'packed' if self.pack else 'padded'}" if len(self.lengths) > 1 else ""
        return self.method + rows + ", recomputed" * self.recompute


class GivenResponses(PromptKD):
    """Goes on with the rows' own."""

    def respond(self, samples, iteration):
        return list(samples)


def peak_in_own_process(case: Case) -> tuple[float, float]:
    """MiB beyond the imports: of weights, gradients and optimizer state, and at the iteration's worst. Forked: this process has only
    imported."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(peak, case).result()


def peak(case: Case) -> tuple[float, float]:
    """The same, here: after an iteration on short rows the optimizer has its moments."""
    torch.set_num_threads(1)
    before = memory("VmRSS")
    method = build(case)
    method.train([row_of(0, 2 * PROMPT, case.vocabulary)], 1)
    always = memory("VmRSS")
    method.train([row_of(i, length, case.vocabulary) for i, length in enumerate(case.lengths)], 2)
    return (always - before) / MIB, (memory("VmHWM") - before) / MIB


def row_of(number: int, positions: int, vocabulary: int) -> Sample:
    """A row of so many input positions."""
    ids = torch.randint(vocabulary, (positions + 1,), generator=torch.Generator().manual_seed(number)).tolist()
    return Sample(number, tuple(ids[:PROMPT]), tuple(ids[PROMPT:]))


def build(case: Case) -> PromptKD:
    """The method on models of its own."""
    layout, rows = start(ParallelConfig(), seed=1), len(case.lengths)
    training = TrainingConfig(
        micro_batch_size=rows, global_batch_size=rows, train_iters=TOTAL_ITERS, pack=case.pack, recompute=case.recompute
    )
    config = Config(method=case.method, training=training)
    configs = [llama(*size, case) for size in (case.student, case.teacher)]
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if case.recompute else {}
    build_one = partial(build_model, layout=layout, **align_vocabularies([case.vocabulary] * 2, 1), **recompute)
    student = build_one(configs[0])
    teacher = LiveTeacher(build_one(configs[1]).eval().requires_grad_(False)) if config.needs_teacher else None
    optimizer = StudentOptimizer(student, training, total_iters=TOTAL_ITERS, distributed=False)
    inputs = MethodInputs(student, optimizer, teacher, PromptTokens([1, 2, 3]), EndIds(stop=(), taught=-1))
    kind = GivenResponses if case.method == "promptkd" else METHODS[case.method]
    return kind(inputs, config, total_iters=TOTAL_ITERS)


def llama(layers: int, hidden: int, case: Case) -> LlamaConfig:
    """Of this size, for rows behind a soft prompt."""
    return LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=hidden // HEAD_SIZE,
        num_key_value_heads=1, vocab_size=case.vocabulary, max_position_embeddings=max(case.lengths) + 64,
    )  # fmt: skip
