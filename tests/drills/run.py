"""The long drill: kills, signals, a full disk, restarts on fewer ranks, two launchers. `make drill`, or some of it: run.py kills signals.

Every case is told in one line as it ends; what differs from the unbroken run, is lost or hangs is counted, and the exit code says whether anything was.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[2] / folder) for folder in ("tests", "scripts", "benchmarks"))

from job import Job, differences
from test_trainer import command, write_inputs

from megakd.checkpointing.native import NativeCheckpoint, read_latest

LAYOUTS = {"TP2": {"tp": 2}, "PP2": {"pp": 2}, "DP2 distributed optimizer": {"use-distributed-optimizer": True}}
METHODS = {
    "sft": {}, "kd": {"on-policy-ratio": 0.5}, "seqkd": {}, "distillm": {"replay-capacity": 12}, "promptkd": {},
    "minillm": {"num-rollouts": 8, "ppo-epochs": 2, "save-interval": 4},
}  # fmt: skip
ITERATIONS = {"train-iters": 24, "save-interval": 4, "eval-interval": 8}
MOMENTS = ("start", "iteration", "write", "export")


@dataclass
class Drill:
    """The lab, its random numbers, and what has been found."""

    lab: Path
    rng: random.Random
    kills: int
    bad: int = 0

    def job(self, save: str, method: str, flags: dict, **options) -> Job:
        """A fresh run folder."""
        shutil.rmtree(self.lab / save, ignore_errors=True)
        for kind in ("out", "err"):
            (self.lab / f"{save}.{kind}").unlink(missing_ok=True)
        return Job(self.lab / save, command(self.lab, save, method, **(ITERATIONS | METHODS[method] | flags)), **options)

    def tell(self, what: str, good: bool, more: str = "") -> None:
        """One line."""
        self.bad += not good
        print(f"{'held' if good else 'NOT '}  {what}{': ' if more else ''}{more}", flush=True)

    def compare(self, what: str, job: Job, reference: Job) -> None:
        """With the unbroken run, to the bit."""
        differ, count = differences(job, reference)
        hidden = [path.name for path in job.save.rglob(".*partial")]
        self.tell(what, differ == 0 and not hidden, f"{differ} of {count} numbers and tensors differ, {len(hidden)} half-written")

    # ---- what is drilled

    def drill_kills(self) -> None:
        """SIGKILL to a random rank or the launcher, at a random or aimed moment; then the same command, until it ends by itself."""
        pairs = [(method, layout) for method in METHODS for layout in LAYOUTS]
        each = max(1, -(-self.kills // len(pairs)))
        self.rng.shuffle(pairs)
        for method, layout in pairs[: self.kills]:
            reference = self.job("reference", method, LAYOUTS[layout]).start()
            self.tell(f"{method} {layout}, unbroken", reference.end(600) == 0)
            job = self.job("killed", method, LAYOUTS[layout])
            done = [self.kill_once(job) for _ in range(each)]
            code = job.start().end(600)
            self.tell(f"{method} {layout}, killed {done}", code == 0, f"exit code {code}")
            self.compare(f"{method} {layout}", job, reference)

    def kill_once(self, job: Job) -> str:
        """Who, and when."""
        who, moment = self.rng.choice(["0", "1", "agent"]), self.rng.choice(MOMENTS)
        first, after = job.iteration, self.rng.randrange(1, 10)
        job.start()
        happens = {
            "start": lambda: len(job.ranks) == 2,
            "iteration": lambda: job.iteration >= min(first + after, 23),
            "write": lambda: any((job.save / "checkpoints").glob(".iter_*.partial")) or job.iteration >= 24,
            "export": lambda: (job.save / ".hf.partial").exists() or (job.save / "hf").exists(),
        }[moment]
        try:
            job.wait_for(happens, 300)
            time.sleep(self.rng.random() * (8 if moment == "start" else 0.05))
            job.kill(who)
            job.process.wait(120)
        except (AssertionError, ProcessLookupError, IndexError, FileNotFoundError) as error:  # it was faster
            job.process.wait(300)
            return f"{moment}: ended before ({type(error).__name__})"
        return f"{moment}: {who}"

    def drill_signals(self) -> None:
        """To the launcher or a rank, of each kind: saved, one line, exit code 0, and the same numbers afterwards."""
        reference = self.job("reference", "promptkd", LAYOUTS["TP2"] | {"train-iters": 200, "eval-interval": 100}).start()
        self.tell("promptkd TP2, unbroken", reference.end(600) == 0)
        job = self.job("told", "promptkd", LAYOUTS["TP2"] | {"train-iters": 200, "eval-interval": 100})
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            for who in ("agent", "0", "1"):
                first = job.iteration
                job.start()
                job.wait_for_iteration(first + 3)
                said = len(job.said("err"))
                pid = job.process.pid if who == "agent" else job.ranks[int(who)]
                subprocess.run(["kill", f"-{number}", str(pid)], check=True)
                code, saved = job.end(120), read_latest(job.save / "checkpoints")
                last, lines = job.said()[-1], len(job.said("err")) - said
                good = code == 0 and last.startswith(f"{number.name}: ended after iteration {saved}/200, which is saved") and lines <= 1
                self.tell(f"{number.name} to {who}", good, f"exit code {code}, {lines} further line(s), saved {saved}")
        self.tell("the rest", job.start().end(600) == 0)
        self.compare("told to stop nine times", job, reference)

    def drill_disk(self) -> None:
        """A disk of 8 MiB (tmpfs, as root) that is full when the third checkpoint is written."""
        disk = self.lab / "disk"
        disk.mkdir(exist_ok=True)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True).returncode:
            print("left out  disk: a tmpfs cannot be mounted here", flush=True)
            return
        try:
            job = self.job("disk/run", "sft", LAYOUTS["TP2"]).start()
            code, last = job.end(300), job.said("err")[-1]
            checkpoints = job.save / "checkpoints"
            NativeCheckpoint(checkpoints).verify()
            partial = list(job.save.rglob(".*partial"))
            self.tell("disk full", code == 2 and "a checkpoint takes" in last and not partial, f"exit code {code}, {last}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def drill_lock(self) -> None:
        """Two runs into one folder."""
        flags = LAYOUTS["TP2"] | {"train-iters": 100000, "save-interval": 100000, "eval-interval": 100000}
        job = self.job("locked", "sft", flags).start()
        job.wait_for_iteration(1)
        other = Job(job.save, job.words).start()
        code, told = other.end(120), [line for line in job.said("err") if "has been at work in it since" in line]
        self.tell("a second run", code == 2 and len(told) == 1, told[0] if told else "not told")
        job.process.send_signal(signal.SIGTERM)
        self.tell("the first goes on", job.end(120) == 0)

    def drill_restarts(self) -> None:
        """torchrun and our launcher start killed ranks again; two launchers, of which one is killed, goes on alone, and is joined again."""
        reference = self.job("reference", "sft", {"train-iters": 1200, "save-interval": 40, "eval-interval": 300}).start()
        self.tell("sft DP2, unbroken", reference.end(600) == 0)
        for launcher in ("torchrun", "megakd.launch"):
            options = ("--nproc_per_node", "2", "--max-restarts", "3")
            job = self.job("restarted", "sft", {"train-iters": 1200, "save-interval": 40, "eval-interval": 300}, launcher=launcher, options=options).start()
            for who in ("1", "0", "1"):
                job.wait_for_iteration(max(job.iteration, 8) + 1)
                attempts = job.attempts
                job.kill(who)
                job.wait_for_attempt(attempts + 1)
            self.tell(f"{launcher} --max-restarts, three ranks killed", job.end(600) == 0)
            self.compare(launcher, job, reference)
        self.two_launchers(reference)

    def two_launchers(self, reference: Job) -> None:
        """DP2 over two launchers on this machine."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "drill", "--rdzv_conf"]
        options = lambda first: (
            *("--nnodes", "1:2", "--nproc_per_node", "1", "--max-restarts", "5"), *meeting, f"last_call_timeout=5,is_host={first}"
        )
        flags = {"train-iters": 100000, "save-interval": 10, "eval-interval": 1000}
        host = self.job("elastic", "sft", flags, options=options(1)).start()
        guest = Job(host.save, host.words, options=options(0)).start()
        host.wait_for_iteration(12)
        guest.kill("machine")
        host.wait_for_attempt(1)
        host.wait_for_iteration(host.iteration + 10)
        self.tell("DP2, one launcher killed: goes on as DP1", True, f"iteration {host.iteration}")
        guest.start()
        host.wait_for_attempt(2)
        self.tell("started again: goes on as DP2", True, f"iteration {host.iteration}")
        host.process.send_signal(signal.SIGTERM)
        codes = host.end(120), guest.end(120)
        self.tell("told to stop", codes == (0, 0), f"exit codes {codes}, saved {read_latest(host.save / 'checkpoints')}")


def drills() -> Iterator[str]:
    """Their names."""
    return (name.removeprefix("drill_") for name in vars(Drill) if name.startswith("drill_"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drills", nargs="*", default=list(drills()), help=f"of {', '.join(drills())}")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megakd-drill-") as folder:
        drill = Drill(write_inputs(Path(folder)), random.Random(args.seed), args.kills)
        for name in args.drills:
            begun = time.monotonic()
            try:
                getattr(drill, f"drill_{name}")()
            except AssertionError as error:
                drill.tell(name, False, str(error))
            print(f"      {name}: {time.monotonic() - begun:.0f} s", flush=True)
    print(f"{drill.bad} did not hold" if drill.bad else "all held", flush=True)
    return int(drill.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
