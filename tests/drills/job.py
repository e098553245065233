"""A job as a cluster has it: launchers and ranks as processes of their own, killed, told and started again by the command alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
LAUNCHERS = {"megakd.launch": ["-m", "megakd.launch"], "torchrun": ["-m", "torch.distributed.run"]}
KEPT = ("iteration", "loss", "valid", "grad_norm", "lr", "tokens", "on_policy_share")  # of metrics.jsonl: no seconds


@dataclass
class Job:
    """One command with its ranks, and the run folder that it fills."""

    save: Path
    words: Sequence[str]
    options: Sequence[str] = ("--nproc_per_node", "2")
    launcher: str = "megakd.launch"
    before: Sequence[str] = ()  # in front of the command: what starts it elsewhere
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def start(self) -> Job:
        """Launch it; its words go into files beside the run folder."""
        out, err = (self.save.with_name(f"{self.save.name}.{kind}").open("a") for kind in ("out", "err"))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"} | self.environment
        command = [*self.before, sys.executable, *LAUNCHERS[self.launcher], *self.options, str(ROOT / "scripts" / "pretrain_kd.py"), *self.words]
        self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        return self

    @property
    def ranks(self) -> list[int]:
        """Its processes on this machine, rank 0 first."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [pid for pid in map(int, found) if "pretrain_kd.py" in words_of(pid)]

    def said(self, kind: str = "out") -> list[str]:
        """All its lines so far, of every attempt."""
        file = self.save.with_name(f"{self.save.name}.{kind}")
        return file.read_text().splitlines() if file.exists() else []

    @property
    def last_words(self) -> str:
        """Why it ended."""
        return " / ".join(self.said("err")[-3:])

    @property
    def rows(self) -> list[dict]:
        """metrics.jsonl so far, without seconds."""
        file = self.save / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [{name: value for name, value in row.items() if name.split("/")[0] in KEPT} for row in rows]

    @property
    def iteration(self) -> int:
        """The last that was logged."""
        return self.rows[-1]["iteration"] if self.rows else -1

    @property
    def attempts(self) -> int:
        """How often its ranks have continued."""
        return sum(line.startswith("continuing") for line in self.said())

    def wait_for_iteration(self, iteration: int) -> None:
        """Until it is logged."""
        self.wait_for(lambda: self.iteration >= iteration, 300)

    def wait_for_attempt(self, attempt: int) -> None:
        """Until its ranks continue for the so-manyth time."""
        self.wait_for(lambda: self.attempts >= attempt, 300)

    def wait_for(self, happens: Callable[[], bool], seconds: float = 120, *, look: float = 0.02) -> None:
        """Until it does, while the job lives."""
        end = time.monotonic() + seconds
        while not happens():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said('err')[-5:]}"
            assert time.monotonic() < end, f"nothing in {seconds} s: {self.said('err')[-5:]}"
            time.sleep(look)

    def end(self, seconds: float = 180) -> int:
        """Its exit code."""
        return self.process.wait(seconds)

    def kill(self, who: str) -> None:
        """SIGKILL to `agent`, whose ranks then have to end by themselves, to a rank by its number, or to the whole `machine`."""
        ranks = self.ranks
        if who == "machine":
            return self.clean_up()
        os.kill(self.process.pid if who == "agent" else ranks[int(who)], signal.SIGKILL)
        if who == "agent":
            self.process.wait()
            wait_until(lambda: not any(map(is_alive, ranks)))

    def clean_up(self) -> None:
        """Nothing of it is left."""
        if self.process and self.process.poll() is None:
            for pid in (*self.ranks, self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait()


def words_of(pid: int) -> str:
    """The command line of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Whether it runs, a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "XZ"
    except OSError:
        return False


def wait_until(happens: Callable[[], bool], seconds: float = 60) -> None:
    """Of processes that are not the job's any more."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"nothing in {seconds} s"
        time.sleep(0.05)


def differences(ours: Job, theirs: Job) -> tuple[int, int]:
    """Numbers that differ between two finished runs' metrics and students, and how many there are: to the bit."""
    pairs = [(a.get(name), b.get(name)) for a, b in zip(ours.rows, theirs.rows) for name in a.keys() | b.keys()]
    students = [load_file(job.save / "hf" / "model.safetensors") for job in (ours, theirs)]
    pairs += [(students[0][name].tolist(), students[1][name].tolist()) for name in students[1]]
    return sum(a != b for a, b in pairs) + abs(len(ours.rows) - len(theirs.rows)), len(pairs)
