"""How a model is spread over ranks: flags of every command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megakd.config.fields import POSITIVE, alias, flag


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
