"""How models are spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from megakd.config.fields import NOT_NEGATIVE, POSITIVE, alias, flag

if TYPE_CHECKING:
    from megakd.config.train import Config


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How a model is spread over ranks; what TP × PP leaves is data parallelism."""

    tensor_model_parallel_size: Annotated[int, alias("--tp")] = flag(1, "ranks that share one layer", range=POSITIVE)
    pipeline_model_parallel_size: Annotated[int, alias("--pp")] = flag(
        1, "ranks that follow each other, each with some of the layers", range=POSITIVE
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(LayoutConfig):
    """The layout of a run, and what else Megatron splits over its ranks."""

    sequence_parallel: bool = flag(False, "split what is between tensor-parallel layers along the sequence too")
    use_distributed_optimizer: bool = flag(False, "split the optimizer's state over data-parallel ranks (ZeRO-1)")
    overlap_grad_reduce: bool = flag(
        False,
        "sum gradients over data-parallel ranks while the last micro-batch's backward pass still runs, a bucket at a time; "
        "with or without --use-distributed-optimizer",
    )


@dataclass(frozen=True, kw_only=True)
class TeacherLayoutConfig:
    """A teacher in a layout of its own. See docs/running.md."""

    teacher_tensor_model_parallel_size: Annotated[int | None, alias("--teacher-tp")] = flag(
        None, "ranks that share one layer of the teacher; default: as the student's", range=POSITIVE, read_by="needs_teacher"
    )
    teacher_pipeline_model_parallel_size: Annotated[int | None, alias("--teacher-pp")] = flag(
        None, "ranks that follow each other with the teacher's layers; default: as the student's", range=POSITIVE, read_by="needs_teacher"
    )

    @property
    def own_ranks(self) -> int:
        """How many ranks are the teacher's alone."""
        return 0

    def sizes(self, student: LayoutConfig) -> tuple[int, int]:
        """TP and PP of the teacher."""
        tp, pp = self.teacher_tensor_model_parallel_size, self.teacher_pipeline_model_parallel_size
        return tp or student.tensor_model_parallel_size, pp or student.pipeline_model_parallel_size

    def flags_given(self, student: LayoutConfig) -> str:
        """What gives the teacher another layout than the student's, as words of the command line; empty where nothing does."""
        tp, pp = self.sizes(student)
        words = [f"--teacher-ranks {self.own_ranks}"] if self.own_ranks else []
        words += [f"--teacher-tensor-model-parallel-size {tp}"] if tp != student.tensor_model_parallel_size else []
        words += [f"--teacher-pipeline-model-parallel-size {pp}"] if pp != student.pipeline_model_parallel_size else []
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class TeacherParallelConfig(TeacherLayoutConfig):
    """Where the teacher of a run lives."""

    teacher_ranks: int = flag(
        0,
        "the last N ranks of the job are the teacher's alone, and work while the student's do; 0: both models are on all ranks",
        range=NOT_NEGATIVE,
        read_by="needs_teacher",
    )
    teacher_offload: bool = flag(
        False, "the teacher's weights, but for its output layer, are on the CPU between its passes", read_by="needs_teacher"
    )

    @property
    def own_ranks(self) -> int:
        return self.teacher_ranks

    def validation_errors(self, config: Config) -> Iterator[str]:
        """What only a teacher in the student's layout can do, one line each."""
        given = self.flags_given(config.parallel)
        ema, elsewhere = config.models.teacher_ema, given or ("--teacher-offload" if self.teacher_offload else "")
        if ema is not None and elsewhere:
            yield f"--teacher-ema {ema} averages the student where it is; leave it out, or {elsewhere}"
        if given and self.teacher_offload:
            yield f"--teacher-offload is for a teacher in the student's layout; leave it out, or {given}"
        if given and config.distillation.hidden_coef:
            yield f"--hidden-coef {config.distillation.hidden_coef:g} matches layers of models in one layout; leave it out, or {given}"
        if given and config.training.reference_compat.teacher_dropout:
            yield f"--reference-behaviour teacher-dropout draws its masks by the student's layout; leave it out, or {given}"
