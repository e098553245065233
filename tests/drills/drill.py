"""What all drills have: a lab, random numbers, and an account of what held."""

from __future__ import annotations

import random
import shutil
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "scripts", "benchmarks"))

from job import Job, differences
from test_trainer import command

LAYOUTS = {"TP2": {"tp": 2}, "PP2": {"pp": 2}, "DP2 distributed optimizer": {"use-distributed-optimizer": True}}
METHODS = {
    "sft": {}, "kd": {"on-policy-ratio": 0.5}, "seqkd": {}, "distillm": {"replay-capacity": 12}, "promptkd": {},
    "minillm": {"num-rollouts": 8, "ppo-epochs": 2, "save-interval": 4},
}  # fmt: skip
ITERATIONS = {"train-iters": 24, "save-interval": 4, "eval-interval": 8}


@dataclass
class Drill:
    """Every case is told in one line as it ends; several may be at work at once."""

    lab: Path
    kills: int
    seed: int
    at_once: int
    bad: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def random(self, *which: str) -> random.Random:
        """Numbers of a case: the same, whatever else is at work."""
        return random.Random(" ".join([str(self.seed), *which]))

    def job(self, save: str, method: str, flags: dict, **options) -> Job:
        """A fresh run folder."""
        shutil.rmtree(self.lab / save, ignore_errors=True)
        for kind in ("out", "err"):
            (self.lab / f"{save}.{kind}").unlink(missing_ok=True)
        return Job(self.lab / save, command(self.lab, save, method, **(ITERATIONS | METHODS[method] | flags)), **options)

    def tell(self, what: str, good: bool, more: str = "") -> None:
        """One line."""
        with self.lock:
            self.bad += not good
            print(f"{'held' if good else 'NOT '}  {what}{': ' if more else ''}{more}", flush=True)

    def compare(self, what: str, job: Job, reference: Job) -> int:
        """With the unbroken run, to the bit; how many numbers and tensors there are."""
        differ, count = differences(job, reference)
        hidden = [path.name for path in job.save.rglob(".*partial")]
        self.tell(what, differ == 0 and not hidden, f"{differ} of {count} numbers and tensors differ, {len(hidden)} half-written")
        return count
