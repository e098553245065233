"""Which rank of which run is simulated, in JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One rank of `world_size`, of the run that pretrain_kd.py has with these flags."""

    flags: dict[str, Any]  # by name, as in config.yaml
    student: dict[str, Any]  # its config.json
    teacher: dict[str, Any] | None = None
    rank: int = 0
    world_size: int = 1
    card: str = "h100"
    prompts: list[int] = field(default_factory=list)  # tokens of each row of a global batch
    responses: list[int] = field(default_factory=list)  # the same of its responses, of the data and of rollouts
    iterations: int = 1  # the last one is recorded
    after: tuple[str, ...] = ()  # "evaluate", "save", "load": what is done, and recorded, behind it
    folder: str = ""  # for checkpoints
    source: str = ""  # the student's folder, whose config and tokenizer a checkpoint holds
    told: list[Any] = field(default_factory=list)  # the last stage's objects, in the order in which the others are told them
    plant: str = ""  # module:function that is called before models are built: a fault that is to be seen

    @property
    def is_last_stage(self) -> bool:
        """Of its pipeline; stages are the slowest axis."""
        stages = self.flags.get("pipeline_model_parallel_size", 1)
        return self.rank // (self.world_size // stages) == stages - 1

    @property
    def job(self) -> str:
        """The same for all ranks of a run."""
        return json.dumps(asdict(replace(self, rank=0, told=[])))

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Simulated:
        """What `write` wrote."""
        told = json.loads(path.read_text())
        return cls(**told | {"after": tuple(told["after"])})
