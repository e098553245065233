"""The command that compares a layout with one rank: python -m megakd.verify."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from megakd.config.base import BaseConfig
from megakd.config.fields import POSITIVE, SEED, Group, alias, flag
from megakd.config.parallel import ParallelConfig

TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}  # of sums in another order; a wrong shard is off by the whole


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(BaseConfig):
    """One iteration of your own models on tiny batches, at a layout and on one rank: do they say the same?

    python -m megakd.verify --model STUDENT --teacher-model TEACHER --tp 4
    """

    model: Annotated[str, alias("--model-name-or-path", "--model-path")] = flag("", "the student's folder", path=True)
    teacher_model: Annotated[str, alias("--teacher-model-name-or-path", "--teacher-model-path")] = flag(
        "", "the teacher's folder; none: the student learns the labels alone", path=True
    )
    parallel: Group[ParallelConfig] = ParallelConfig()
    replicas: int = flag(1, "data-parallel replicas beside TP and PP", range=POSITIVE)
    dtype: Literal["fp32", "bf16"] = flag("fp32", "weights and activations; in fp32 a wrong layout shows best")
    rows: int = flag(4, "rows of random tokens, a multiple of --replicas", range=POSITIVE)
    length: int = flag(24, "tokens of the longest row", range=POSITIVE)
    tolerance: float | None = flag(
        None, "largest difference, as a share of the largest number; default: 1e-4 with fp32, 0.03 with bf16", range=POSITIVE
    )
    seed: int = flag(1234, "of the rows", range=SEED)
    out: str = flag("", "compare nothing: write what the ranks that were started say into this file", path=True)

    @property
    def ranks(self) -> int:
        """Of the layout."""
        return self.parallel.tensor_model_parallel_size * self.parallel.pipeline_model_parallel_size * self.replicas

    @property
    def largest_difference(self) -> float:
        """--tolerance, or that of the dtype."""
        return self.tolerance or TOLERANCE[self.dtype]

    def validation_errors(self) -> Iterator[str]:
        """What cannot be compared."""
        if not self.model:
            yield "--model is missing; give the student's Hugging Face folder or native checkpoint"
        if self.rows % self.replicas:
            yield f"--rows {self.rows} is not a multiple of --replicas {self.replicas}; make it one"
        if self.length < 8:
            yield f"--length {self.length} leaves no room for a prompt and a response; give 8 or more"
