"""PromptKD as this project trains it, with responses whose ends are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megakd.config import BenchmarkConfig, Config, DataConfig, GenerationConfig, ModelConfig, TrainingConfig
from megakd.data.batch import Sample
from megakd.data.dataloader import split_across_dp
from megakd.data.end_ids import EndIds
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.loading import ModelFolders, start
from megakd.methods.base import Method, MethodInputs
from megakd.methods.promptkd import PromptKD
from megakd.optimizer import StudentOptimizer
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.teachers.live import LiveTeacher
from megakd_benchmarks.workload import PositionCounter, Workload

TOTAL_ITERS = 1000  # of the run that the measured iterations belong to: says how far the weight of KL(p_P‖p) has fallen
ENDLESS = EndIds(stop=(), taught=-1)  # no token ends a response


class GivenEndsPromptKD(PromptKD):
    """Writes responses as long as the rows' own, then goes on with the rows' own."""

    def respond(self, samples, iteration):
        written = self.write(samples, iteration)
        assert [len(response) for response in written] == [len(sample.response) for sample in samples]
        return list(samples)

    def write(self, samples: Sequence[Sample], seed: int) -> list[list[int]]:
        """Responses of the student as long as the rows' own; `seed` is that of their noise."""
        limits = [len(sample.response) for sample in samples]
        return write(self, samples, Sampling(max_new_tokens=max(limits), seed=seed), limits)


def write(method: Method, samples: Sequence[Sample], sampling: Sampling, limits: Sequence[int] | None = None) -> list[list[int]]:
    """Responses of the student that no token ends, of so many tokens each; none: the most that `sampling` allows."""
    prompts, ids = [sample.prompt for sample in samples], [sample.sample_id for sample in samples]
    batch_size = method.config.generation.rollout_batch_size
    return generate(method.student, prompts, ids, sampling, eos_id=ENDLESS.stop, batch_size=batch_size, limits=limits)


class MegakdSystem:
    """The models in the layout of `config`, this rank's part."""

    name = "megakd"

    def __init__(self, config: BenchmarkConfig, workload: Workload, models: Path):
        self.layout = start(config.parallel, seed=config.seed)
        self.method = _build_method(config, workload, models, self.layout)
        self.time, self.counter = self.method.time, PositionCounter()
        for model in (self.method.student, self.method.teacher.model):
            self.counter.watch(model)

    def iterate(self, batch: Sequence[Sample], iteration: int) -> dict[str, float]:
        """Losses of one PromptKD iteration on this replica's share of a global batch."""
        return self.method.train(self._mine(batch), iteration)

    def generate(self, batch: Sequence[Sample]) -> list[list[int]]:
        """This replica's responses, the same at every call."""
        return self.method.write(self._mine(batch), seed=0)

    def _mine(self, batch: Sequence[Sample]) -> list[Sample]:
        return split_across_dp(batch, self.layout.dp_size)[self.layout.dp_rank]


def _build_method(config: BenchmarkConfig, workload: Workload, models: Path, layout: ParallelLayout) -> GivenEndsPromptKD:
    run = run_config(config, models)
    folders = ModelFolders.open(run.models.model, run.models.teachers)
    student, teacher = folders.load(layout, config.dtype, sequence_parallel=config.parallel.sequence_parallel)
    optimizer = StudentOptimizer(
        student, run.training, total_iters=TOTAL_ITERS, distributed=config.parallel.use_distributed_optimizer
    )
    inputs = MethodInputs(student, optimizer, LiveTeacher(teacher), PromptTokens(workload.prompt_ids), ENDLESS)
    return GivenEndsPromptKD(inputs, run, total_iters=TOTAL_ITERS)


def run_config(config: BenchmarkConfig, models: Path) -> Config:
    """The run that the measured iterations belong to."""
    return Config(
        models=ModelConfig(model=str(models / "student"), teacher_model=str(models / "teacher"), dtype=config.dtype),
        data=DataConfig(max_length=config.max_length, max_prompt_length=config.max_prompt_length),
        parallel=config.parallel,
        generation=GenerationConfig(rollout_batch_size=config.rollout_batch_size),
        training=TrainingConfig(
            micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size,
            train_iters=TOTAL_ITERS,
            lr=config.lr,
            lr_decay_style="constant",
            seed=config.seed,
        ),
    )


class PromptTokens:
    """As much of a tokenizer as the soft prompt asks for."""

    def __init__(self, ids: Sequence[int]):
        self.ids = list(ids)

    def encode(self, text: str, **_) -> list[int]:
        """`ids`, whatever the text."""
        return self.ids
