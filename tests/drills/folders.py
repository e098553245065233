"""One job at a time: told to stop, without room, beside another, with a damaged checkpoint."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess

from drill import LAYOUTS, Drill
from job import Job
from test_checksums import DAMAGES, flipped

from megakd.checkpointing.native import NativeCheckpoint, read_latest
from megakd.errors import UserError

SIGNALS, TIMES = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), 20
ENDLESS = {"train-iters": 100000, "save-interval": 100000, "eval-interval": 100000}


def drill_signals(drill: Drill) -> None:
    """To the launcher or a rank, of each kind: saved, one line, exit code 0, and the same numbers afterwards."""
    flags = LAYOUTS["TP2"] | {"train-iters": 200, "eval-interval": 100}
    reference, job = drill.job("reference", "promptkd", flags).start(), drill.job("told", "promptkd", flags)
    saved = 0
    for number, who in itertools.islice(itertools.cycle(itertools.product(SIGNALS, ("agent", "0", "1"))), TIMES):
        saved += _told_once(drill, job, number, who)
    drill.tell(f"{saved} of {TIMES} saved", saved == TIMES)
    drill.tell("the rest", (job.start().end(600), reference.end(600)) == (0, 0))
    drill.compare(f"told to stop {TIMES} times", job, reference)


def _told_once(drill: Drill, job: Job, number: signal.Signals, who: str) -> bool:
    said, first = len(job.said("err")), job.iteration
    job.start()
    job.wait_for_iteration(first + 3)
    lines_before = len(job.said("err"))
    subprocess.run(["kill", f"-{number}", str(job.process.pid if who == "agent" else job.ranks[int(who)])], check=True)
    code, saved = job.end(120), read_latest(job.save / "checkpoints")
    last, lines = job.said()[-1], len(job.said("err")) - max(said, lines_before)
    good = code == 0 and last.startswith(f"{number.name}: ended after iteration {saved}/200, which is saved") and lines <= 1
    drill.tell(f"{number.name} to {who}", good, f"exit code {code}, {lines} further line(s), saved {saved}")
    return good


def drill_disk(drill: Drill) -> None:
    """A disk of 8 MiB (tmpfs, as root) that is full when a checkpoint is written, at once or beside training."""
    disk = drill.lab / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if (refused := subprocess.run(mount, capture_output=True, text=True)).returncode:
        print(f"left out  disk: {' '.join(mount)}: {refused.stderr.strip()}", flush=True)
        return
    try:
        for how, flags in {"disk full": {}, "disk full, --async-save": {"async-save": True}}.items():
            job = drill.job("disk/run", "sft", LAYOUTS["TP2"] | flags).start()
            code, last = job.end(300), job.said("err")[-1]
            NativeCheckpoint(job.save / "checkpoints").verify()
            partial, saved = list(job.save.rglob(".*partial")), read_latest(job.save / "checkpoints")
            good = code == 2 and "a checkpoint takes" in last and not partial
            drill.tell(how, good, f"exit code {code}, {last}; iteration {saved} verifies, {len(partial)} half-written")
            shutil.rmtree(job.save)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def drill_lock(drill: Drill) -> None:
    """Two runs into one folder."""
    job = drill.job("locked", "sft", LAYOUTS["TP2"] | ENDLESS).start()
    job.wait_for_iteration(1)
    other = Job(job.save, job.words).start()
    code, told = other.end(120), [line for line in job.said("err") if "has been at work in it since" in line]
    drill.tell("a second run", code == 2 and len(told) == 1, told[0] if told else "not told")
    job.process.send_signal(signal.SIGTERM)
    drill.tell("the first goes on", job.end(120) == 0)


def drill_damage(drill: Drill) -> None:
    """Every file of a checkpoint in every way, opened in this process; three of them by the command itself, which then goes on from the previous."""
    flags = LAYOUTS["TP2"] | {"train-iters": 12, "eval-interval": 4}
    reference, job = drill.job("reference", "sft", flags).start(), drill.job("damaged", "sft", flags).start()
    drill.tell("sft TP2, unbroken, twice", (reference.end(600), job.end(600)) == (0, 0))
    checkpoints = job.save / "checkpoints"
    files = sorted(path for path in (checkpoints / "iter_0000012").rglob("*") if path.is_file())
    named = sum(_is_named(checkpoints, file, damage) for file in files for damage in DAMAGES.values())
    drill.tell(f"{len(files)} files in {len(DAMAGES)} ways", named == len(files) * len(DAMAGES), f"{named} named, with the way back")
    for name, damage in {"__1_0.distcp": lambda file: flipped(file, 0.5), ".metadata": DAMAGES["gone"], "common.pt": DAMAGES["emptied"]}.items():
        file = checkpoints / "iter_0000012" / name
        before, lines = file.read_bytes(), len(job.said("err"))
        damage(file)
        code, told = job.start().end(300), [line for line in job.said("err")[lines:] if line.startswith("error")]
        good = code == 2 and name in told[0] and "--resume 8 continues" in told[0] and "Traceback" not in "".join(job.said("err")[lines:])
        drill.tell(f"the command with {name} damaged", good, told[0] if told else "nothing told")
        file.write_bytes(before)
    flipped(checkpoints / "iter_0000012" / "__1_0.distcp", 0.5)
    job.words = [*job.words, "--resume", "previous"]
    drill.tell("--resume previous", job.start().end(300) == 0)
    drill.compare("the rest", job, reference)


def _is_named(checkpoints, file, damage) -> bool:
    before = file.read_bytes()
    damage(file)
    try:
        NativeCheckpoint(checkpoints, flag="--save").verify()
    except UserError as error:
        return file.name in str(error) and "--resume 8 continues" in str(error)
    finally:
        file.write_bytes(before)
    return False
