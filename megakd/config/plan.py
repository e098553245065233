"""The command that says what a run will need before there is a GPU for it: scripts/plan.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megakd.config.fields import POSITIVE, Group, flag
from megakd.config.parallel import TeacherParallelConfig
from megakd.config.train import Config

GpuName = Literal["a100", "h100", "h200", "b200", "l40s"]  # simulation/cards.py has their sizes and speeds


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """For which machine, and how closely."""

    gpu: GpuName = flag("h100", "the card: A100 of 80 GB, H100 of 80 GB, H200, B200, L40S")
    gpus: int | None = flag(None, "cards at hand; default: as many as TP × PP", range=POSITIVE)
    rank_layouts: bool = flag(False, "try every TP and PP that fits the models on the cards at hand, not only the one given")
    most_stages: int | None = flag(None, "with --rank-layouts: pipeline stages at most; default: as many as fit", range=POSITIVE)
    prompt_tokens: int | None = flag(None, "of every row; default: --max-prompt-length", range=POSITIVE)
    response_tokens: int | None = flag(None, "of every row; default: --max-new-tokens", range=POSITIVE)
    out: str = flag("", "folder for plan.md, plan.json and plan.png; none: the page is printed alone", path=True)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """Memory, messages and time of a run, from the config.json of its models: no weights, no data, no GPU.

    python scripts/plan.py --method promptkd --model STUDENT --teacher-model TEACHER --tp 4 --gpus 8 --gpu h100 --micro-batch-size 16
    """

    plan: Group[PlanFlags] = PlanFlags()

    def _missing(self) -> Iterator[str]:
        yield from (line for line in super()._missing() if not line.startswith(("--train-data is", "--save is")))

    def _contradictions(self) -> Iterator[str]:
        yield from (line for line in super()._contradictions() if not line.startswith("--train-iters"))
        yield from self._not_simulated()

    def _not_simulated(self) -> Iterator[str]:
        """What a single simulated rank cannot show."""
        if self.teacher.teacher_cache or self.teacher.teacher_quantize != "none" or self.models.named_teachers:
            yield "a teacher that is stored, quantised or one of several is not planned; give --teacher-model one folder alone"
        if self.teacher_parallel != TeacherParallelConfig():
            yield "a teacher with a layout or ranks of its own is not planned; leave out --teacher-tp, --teacher-pp and --teacher-ranks"
        if self.writes_with_vllm:
            yield "--rollout-engine vllm is not planned: it takes --vllm-gpu-memory-utilization of each card and its own time; leave it out"
