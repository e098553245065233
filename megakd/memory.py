"""What a run takes on a rank, by formula: from two configs, the layout, the batch and the lengths of its rows, before anything is loaded.

    always      weights, gradients (float32), optimizer state (float32: two moments, under bf16 the master weights too), the teacher
    then        the larger of a rollout (keys and values of all rows under way) and a student's step (activations of the micro-batches in
                flight, hidden states of the teacher, one chunk of logits), and of the optimizer's step (its temporaries)

What Python, torch and the libraries take themselves (some 0.5 GiB of a process, a context of a GPU) comes on top.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from megakd.config import Config
from megakd.loading import ModelFolders
from megakd.models.model_provider import padded_vocab_size
from megakd.models.sizes import StageSizes, parameter_count, stage_sizes
from megakd.runtime.parallel_layout import Grid

FLOAT, GIB = 4, 1024**3
CHUNK_ROWS = {"cpu": 128, "cuda": 2048}  # of logits that exist at a time (megakd_kernels/heads)
FRAGMENTS = 0.08  # of all, what an allocator loses between blocks: 2 to 28 % in runs on a CPU, mostly below 15 (tests/test_dry_run.py)
WITHOUT_WEIGHTS = 0.6  # of a layer's activations, those that a gradient needs which passes through it to a soft prompt
CODE_BYTES = {"int8": 1.0, "int4": 0.625, "int8-dynamic": 1.0, "fp8-dynamic": 1.0}  # of a quantised weight, scales included


@dataclass(frozen=True)
class Load:
    """What is asked of a rank: rows and their lengths."""

    rows: int  # of an iteration, on one replica
    micro_batches: int  # of an iteration, on one replica
    length: int  # of the longest row
    tokens: int  # positions of the largest micro-batch
    written: bool  # the student writes responses
    device: str = "cpu"


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    rollout: int
    step: int
    update: int

    @property
    def peak(self) -> int:
        """The most that exists at a time."""
        always = self.weights + self.gradients + self.optimizer + self.teacher
        return round((1 + FRAGMENTS) * (always + max(self.rollout, self.step, self.update)))


def memory_per_stage(
    config: Config, model: PretrainedConfig, teachers: Sequence[PretrainedConfig], grids: tuple[Grid, Grid], load: Load
) -> list[RankMemory]:
    """Of a rank of each of the student's stages, first to last."""
    student, teacher = grids
    padded = padded_vocab_size([hf.vocab_size for hf in (model, *teachers)], math.lcm(student.tp_size, teacher.tp_size))
    options = {"padded_vocab_size": padded, "sequence_parallel": config.parallel.sequence_parallel}
    sizes = [
        stage_sizes(model, tp=student.tp_size, pp=student.pp_size, stage=stage, **options) for stage in range(student.pp_size)
    ]
    taught = [[] for _ in sizes] if teacher.first else teacher_sizes(teachers, student, teacher, padded)
    return [rank_memory(config, sizes[i], taught[i], student, i, load, padded, model.hidden_size) for i in range(len(sizes))]


def number_bytes(config: Config, load: Load) -> int:
    """Of a weight or an activation."""
    is_bf16 = config.models.dtype == "bf16" or (config.models.dtype == "auto" and load.device == "cuda")
    return 2 if is_bf16 else FLOAT


def rank_memory(
    config: Config, size: StageSizes, teachers: list[StageSizes], grid: Grid, stage: int, load: Load, padded: int, hidden: int
) -> RankMemory:
    """Of one rank of one stage."""
    number = number_bytes(config, load)
    trained = trained_parameters(config, size)
    split = grid.dp_size if config.parallel.use_distributed_optimizer else 1
    in_flight = min(grid.pp_size - stage, load.micro_batches)
    tokens = load.tokens
    kept = size.layers * hidden + size.of_one_layer if config.training.recompute else size.activations
    is_last = stage == grid.pp_size - 1
    chunk = min(CHUNK_ROWS[load.device], tokens) * padded // grid.tp_size
    heads = is_last * (2 if config.needs_teacher else 1) * 4 * FLOAT * chunk  # logits, their softmax, its logarithm, the gradient
    known = is_last * config.needs_teacher * load.rows * load.length * hidden  # what the teacher said of every row
    through = WITHOUT_WEIGHTS * sum(teacher.activations for teacher in teachers) if config.page.soft_prompt_len else 0
    at_once = min(config.generation.rollout_batch_size, load.rows) if load.written else 0
    return RankMemory(
        weights=number * size.parameters,
        gradients=FLOAT * trained,
        optimizer=state_bytes(config, number) * trained // split,
        teacher=sum(teacher_bytes(config, teacher, number) for teacher in teachers),
        rollout=at_once * (size.cache * load.length * number + is_last * 4 * FLOAT * padded // grid.tp_size),
        step=round(number * (in_flight * tokens * max(kept, through) + known + tokens * (2 * hidden + size.of_one_layer)) + heads),
        update=2 * FLOAT * min(size.largest, trained),
    )


def trained_parameters(config: Config, size: StageSizes) -> int:
    """All, or an adapter's two narrow matrices for each of the layers' matrices, each as wide as a square one."""
    if not config.lora.rank:
        return size.parameters
    matrices = 4 * size.layers
    return matrices * 2 * config.lora.rank * round(math.sqrt(size.linear / max(1, matrices)))


def state_bytes(config: Config, number: int) -> int:
    """Of the optimizer, a weight."""
    moments = 2 if config.training.optimizer == "adamw" else int(config.training.momentum > 0)
    return FLOAT * (moments + (number < FLOAT))


def teacher_sizes(teachers: Sequence[PretrainedConfig], student: Grid, teacher: Grid, padded: int) -> list[list[StageSizes]]:
    """Of all teachers on a rank of each of the student's stages; in another layout their stages are spread over the same ranks."""
    options = {"padded_vocab_size": padded, "tp": teacher.tp_size, "pp": teacher.pp_size}
    stages = [stage * teacher.pp_size // student.pp_size for stage in range(student.pp_size)]
    return [[stage_sizes(hf, stage=stage, **options) for hf in teachers] for stage in stages]


def teacher_bytes(config: Config, size: StageSizes, number: int) -> int:
    """Of a teacher's weights, where they are kept here."""
    if config.teacher_parallel.teacher_offload:
        return number * size.head
    coded = CODE_BYTES.get(config.teacher.teacher_quantize, number)
    return round(number * (size.parameters - size.linear) + coded * size.linear)


# ---- on disk


def written_bytes(config: Config, folders: ModelFolders) -> tuple[int, int]:
    """Of a checkpoint and of the export, without what is small."""
    number, hf = number_bytes(config, Load(1, 1, 1, 1, False)), folders.student.config
    whole, adapters = parameter_count(hf), config.lora.rank
    if adapters:
        size = stage_sizes(hf, padded_vocab_size=hf.vocab_size, tp=1, pp=1, stage=0)
        trained = trained_parameters(config, size)
        return (number + state_bytes(config, number)) * trained, number * (trained if config.lora.exports_adapter else whole)
    return (number + state_bytes(config, number)) * whole, number * whole


def free_bytes(path: Path) -> int:
    """Of the disk that the path is, or will be, on."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free
