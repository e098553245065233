"""What a scale of the comparison will do: its stages, the memory each rank needs, and the time they take, without doing it.

Memory of a rank is what `pretrain_kd.py --dry-run` says of such models (megakd/memory.py): a row as long as --max-length, on every place of
the layout. An evaluation holds both models and the keys and values of a batch.

Time, P parameters and t = TP × PP, on a device that reaches F floating-point operations a second and reads B bytes of memory a second:

    learning      a pass of a micro-batch of n positions through P parameters takes 2 P n / (t F), or the device's overhead for
                  each layer if that is longer; PASSES says how many passes a method makes, backward counted as two
    writing       a token of a batch takes reading the weights once, 2 P bytes / (t B), or its operations, or that overhead,
                  whichever is longest; a batch takes as many tokens as its longest response

A row has as many positions as those of MiniLLM's Dolly on average, 147, and a response 76, or what --max-length leaves. F, B and
the overhead are what such models reach on the device, not what its sheet promises.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from transformers import PretrainedConfig

from megakd.config import Config, EvaluateConfig, from_yaml
from megakd.errors import quiet_pipe
from megakd.memory import Load, memory_per_stage
from megakd.methods import METHODS
from megakd.models.sizes import parameter_count, stage_sizes
from megakd.planning.scale import model_of, read_scale
from megakd.runtime.parallel_layout import Grid

GIB = 1024**3
TRAINING_STAGES = ("sft_teacher", "sft_student", "kd", "seqkd", "minillm", "promptkd")
TRAINING_ROWS = 11435
ROW, RESPONSE = 147, 76  # positions of a Dolly row, tokens of its response
TEST_SETS = (500, 242, 80, 1694, 10000)  # rows: Dolly, SelfInst, Vicuna, S-NI, UnNI
PASSES = {  # method: student's, teacher's
    "sft": (3, 0),
    "kd": (3, 1),
    "seqkd": (3, 0),
    "minillm": (6, 2),  # rollouts and text; the teacher reads the rollouts once, which counts less than this
    "promptkd": (4, 4),  # prompt step: student, base teacher, prompted teacher and back; then prompted teacher, student
}
STARTING = 20  # seconds of a command before its first iteration


@dataclass(frozen=True)
class Device:
    """What large models reach on it, not its data sheet."""

    flops: float  # a second, reached by a large matrix product with all that is around it
    bandwidth: float  # bytes a second
    layer_overhead: float  # seconds a decoder layer takes at least
    kind: str = "cuda"

    @property
    def value_bytes(self) -> int:
        """Of a weight."""
        return 4 if self.kind == "cpu" else 2


DEVICES = {
    "cpu": Device(50e9, 8e9, 1e-3, "cpu"),  # one core
    "A100": Device(120e12, 1.2e12, 5e-4),
    "H200": Device(300e12, 3.0e12, 5e-4),
}


@dataclass(frozen=True)
class Stage:
    """What one command of paper.sh will take, on the worst rank."""

    name: str
    iterations: int | None
    bytes: float
    seconds: float


class Plan:
    """All stages of one scale."""

    def __init__(self, configs: Path) -> None:
        self.configs, scale = configs, read_scale(configs)
        self.ranks, self.test_rows, self.device = scale["ranks"], scale["test_rows"], DEVICES[scale["device"]]
        self.device_name = scale["device"]
        self.student, self.teacher = (model_of(scale, role) for role in ("student", "teacher"))
        self.names = [scale[role]["name"] for role in ("teacher", "student")]

    def stages(self) -> Iterator[Stage]:
        """In the order of paper.sh; the data, the choice of the initial student and the report take no time to speak of."""
        for name in TRAINING_STAGES:
            yield self.training(name, from_yaml(self.configs / f"{name}.yaml"))
        evaluation = from_yaml(self.configs / "evaluate.yaml", EvaluateConfig)
        for name in TRAINING_STAGES:
            yield self.evaluation(f"evaluate {name}", evaluation, self.teacher if name == "sft_teacher" else self.student)

    def training(self, name: str, config: Config) -> Stage:
        """One training run; `name` says whether the teacher learns or a student."""
        model = self.teacher if name == "sft_teacher" else self.student
        seconds = STARTING + self.training_seconds(config, model)
        return Stage(name, iterations(config), self.training_bytes(config, model), seconds)

    def training_bytes(self, config: Config, model: PretrainedConfig) -> int:
        """Of the rank that needs most."""
        parallel, training, length = config.parallel, config.training, config.data.max_length
        replicas, most = self.ranks // tensor_parallel(config), training.micro_batch_size
        grid = Grid(0, parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, replicas)
        rows, writes = training.global_batch_size // replicas, METHODS[config.method].answers_prompts(config)
        load = Load(rows, math.ceil(rows / most), length, most * length, writes, self.device.kind)
        teachers = [self.teacher] if config.needs_teacher else []
        return max(stage.peak for stage in memory_per_stage(config, model, teachers, (grid, grid), load))

    def training_seconds(self, config: Config, model: PretrainedConfig) -> float:
        """Of all iterations, rollouts included."""
        training, t = config.training, tensor_parallel(config)
        micro_batches = training.global_batch_size / (training.micro_batch_size * self.ranks / t)
        positions = training.micro_batch_size * min(ROW, config.data.max_length)
        own, teachers = PASSES[config.method]
        reading = own * self.one_pass(model, positions, t) + teachers * self.one_pass(self.teacher, positions, t)
        return iterations(config) * micro_batches * reading + self.rollout_seconds(config)

    def one_pass(self, model: PretrainedConfig, positions: int, t: int) -> float:
        """Seconds of a micro-batch's forward pass."""
        return max(2 * parameter_count(model) * positions / (t * self.device.flops), model.num_hidden_layers * self.device.layer_overhead)

    def rollout_seconds(self, config: Config) -> float:
        """What is written over the whole run."""
        rows, t = iterations(config) * config.training.global_batch_size, tensor_parallel(config)
        write = partial(self.writing, batch=config.generation.rollout_batch_size, length=config.max_new_tokens, t=t)
        if config.method == "promptkd":
            return write(self.student, rows)
        if config.method == "seqkd":  # each prompt once
            return write(self.teacher, min(rows, TRAINING_ROWS))
        if config.method == "minillm":  # both, for the mixture
            return sum(write(model, rows / config.minillm.ppo_epochs) for model in (self.student, self.teacher))
        return 0

    def writing(self, model: PretrainedConfig, rows: float, *, batch: int, length: int, t: int) -> float:
        """Seconds for `rows` responses, dealt to all replicas."""
        device = self.device
        reading = parameter_count(model) * device.value_bytes / (t * device.bandwidth)
        computing = 2 * parameter_count(model) * batch * min(RESPONSE, length) / length / (t * device.flops)
        step = max(reading, computing, model.num_hidden_layers * device.layer_overhead)
        return rows / (batch * self.ranks / t) * length * step

    def evaluation(self, name: str, config: EvaluateConfig, model: PretrainedConfig) -> Stage:
        """Answers of the model for every seed; for the exposure bias one more of the teacher."""
        rows, t = sum(min(self.test_rows, size) for size in TEST_SETS), tensor_parallel(config)
        batch, length = config.responses.batch_size, config.responses.max_new_tokens
        write = partial(self.writing, batch=batch, length=length, t=t)
        seconds = write(model, rows * len(config.seeds)) + write(self.teacher, rows * config.exposure_bias)
        sizes = [stage_sizes(hf, padded_vocab_size=hf.vocab_size, tp=t, pp=1, stage=0) for hf in (model, self.teacher)]
        cache = max(size.cache for size in sizes) * (config.responses.max_prompt_length + length) * batch
        memory = self.device.value_bytes * (sum(size.parameters for size in sizes) + cache)
        return Stage(name, None, memory, STARTING + seconds)


def tensor_parallel(config: Config | EvaluateConfig) -> int:
    """Ranks that share a model."""
    return config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size


def iterations(config: Config) -> int:
    """Optimizer steps, on MiniLLM's Dolly."""
    training = config.training
    return training.train_iters or training.epochs * (TRAINING_ROWS // training.global_batch_size)


def main() -> None:
    args = parse_args()
    with quiet_pipe():
        print_page(Plan(args.configs), args.out)


def print_page(plan: Plan, out: Path) -> None:
    """Every stage, and what is still to do."""
    print(f"{plan.configs.name}: {plan.names[0]} teaches {plan.names[1]}, on {plan.ranks} × {plan.device_name}\n")
    print(f"{'stage':24}{'iterations':>12}{'GiB a rank':>12}{'time':>18}")
    total = 0.0
    for stage in plan.stages():
        state = "there already" if done(out, stage.name) else str(timedelta(seconds=round(stage.seconds)))
        total += 0 if state == "there already" else stage.seconds
        print(f"{stage.name:24}{stage.iterations or '':>12}{stage.bytes / GIB:12.1f}{state:>18}")
    print(f"\nabout {timedelta(seconds=round(total))} in all, into {out}; how this is estimated: docs/recipes.md")


def done(out: Path, stage: str) -> bool:
    """Whether the stage has left its result in OUT."""
    name = stage.removeprefix("evaluate ")
    return (out / name / "hf" if name == stage else out / "evaluation" / name / "results.json").exists()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, help="folder of the scale, with scale.yaml")
    parser.add_argument("--out", type=Path, required=True, help="OUT of paper.sh")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
