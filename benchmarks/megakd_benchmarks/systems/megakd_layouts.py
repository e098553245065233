"""megakd, as a run trains: KD on the student's own responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megakd.config import (
    Config,
    DataConfig,
    DistillationConfig,
    GenerationConfig,
    KDConfig,
    ModelConfig,
    ParallelConfig,
    SystemsConfig,
    TrainingConfig,
)
from megakd.data.batch import Sample
from megakd.data.dataloader import split_across_dp
from megakd.generation.sampling import Sampling
from megakd.loading import ModelFolders, start
from megakd.methods.base import MethodInputs
from megakd.methods.kd import KD
from megakd.optimizer import StudentOptimizer
from megakd.teachers.live import LiveTeacher
from megakd_benchmarks.megakd_system import ENDLESS, write
from megakd_benchmarks.systems.turns import Turn
from megakd_benchmarks.systems.workload import CHECKED, LOSS, Task


class FixedLengthKD(KD):
    """On-policy KD whose responses all have as many tokens: no token ends one."""

    greedy = True

    def respond(self, samples: Sequence[Sample], iteration: int) -> list[Sample]:
        """The samples with what the student writes."""
        sampling = Sampling(max_new_tokens=self.config.generation.max_new_tokens, seed=iteration, greedy=self.greedy)
        return [replace(sample, response=tuple(response)) for sample, response in zip(samples, write(self, samples, sampling))]

    def train(self, samples, iteration):
        with self.time("rollout"):
            samples = self.respond(samples, iteration)
        return self.learn(samples, iteration, kd_ratio=1.0)


class Megakd:
    """One rank of megakd on its own."""

    parallel = ParallelConfig()

    def __init__(self, config: SystemsConfig, task: Task, models: Path):
        self.layout = start(self.parallel, seed=config.seed)
        self.task, run = task, run_config(config, models, self.parallel)
        folders = ModelFolders.open(run.models.model, run.models.teachers)
        student, teacher = folders.load(self.layout, config.dtype)
        optimizer = StudentOptimizer(student, run.training, total_iters=run.training.train_iters, distributed=False)
        inputs = MethodInputs(student, optimizer, LiveTeacher(teacher), None, ENDLESS)
        self.method = FixedLengthKD(inputs, run, total_iters=run.training.train_iters)

    def run(self, turn: Turn) -> None:
        """Every iteration."""
        for batch in self.task.prompts:
            turn.begin()
            self.method.greedy = turn.number <= CHECKED
            losses = self.method.train(self.mine(batch), turn.number)
            turn.end(losses[f"loss/{LOSS}"])

    def generate(self, prompts: Sequence[Sequence[int]]) -> None:
        """Responses to this replica's share."""
        self.method.respond(self.mine(prompts), iteration=1)

    def mine(self, prompts: Sequence[Sequence[int]]) -> Sequence[Sample]:
        """This replica's share of a batch."""
        rows = [Sample(i, tuple(prompt), ()) for i, prompt in enumerate(prompts)]
        return split_across_dp(rows, self.layout.dp_size)[self.layout.dp_rank]


class MegakdTP2(Megakd):
    """One of two ranks that share every matrix."""

    parallel = ParallelConfig(tensor_model_parallel_size=2)


class MegakdPP2(Megakd):
    """One of two ranks that have half of the layers each."""

    parallel = ParallelConfig(pipeline_model_parallel_size=2)


class MegakdDP2(Megakd):
    """One of two ranks that have half of the rows each."""


def run_config(config: SystemsConfig, models: Path, parallel: ParallelConfig) -> Config:
    """The run that the measured iterations belong to."""
    return Config(
        models=ModelConfig(model=str(models / "student"), teacher_model=str(models / "teacher"), dtype=config.dtype),
        data=DataConfig(max_length=config.max_prompt_length + config.max_new_tokens, max_prompt_length=config.max_prompt_length),
        parallel=parallel,
        method="kd",
        kd=KDConfig(on_policy_ratio=1.0),
        generation=GenerationConfig(max_new_tokens=config.max_new_tokens),
        distillation=DistillationConfig(kd_objective=LOSS, kd_ratio=1.0),
        training=TrainingConfig(
            micro_batch_size=config.micro_batch_size,
            global_batch_size=config.global_batch_size,
            lr=config.lr,
            lr_decay_style="constant",
            seed=config.seed,
        ),
    )
