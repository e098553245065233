"""SIGKILL to a rank or the launcher, at aimed and random moments; then the same command, until it ends by itself.

Eighteen cases, method by layout, some at once: a job that waits for its dead leaves the cores idle. Unbroken runs are made before, by forked
ranks, which import nothing anew. Every second case writes its checkpoints with --async-save, and is compared with an unbroken run that does not.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from distributed import run_distributed
from drill import ITERATIONS, LAYOUTS, METHODS, Drill
from job import Job
from test_trainer import run

from megakd.checkpointing.native import NativeCheckpoint, read_latest

MOMENTS = ("start", "iteration", "write", "export")
LAST, START_SECONDS, TRIES = ITERATIONS["train-iters"], 6.0, 3


def drill_kills(drill: Drill) -> None:
    """So many kills that met a job at work, over all cases."""
    cases = [(method, layout) for method in METHODS for layout in LAYOUTS][: drill.kills]
    for method, layout in cases:
        flags = LAYOUTS[layout]
        job = drill.job(_slug(method, layout), method, flags)
        run_distributed(_unbroken, 2, job.words, job.save.with_suffix(".out"), tp=flags.get("tp", 1), pp=flags.get("pp", 1), timeout=600)
    drill.tell(f"{len(cases)} unbroken runs", True)
    share = lambda number: drill.kills // len(cases) + (number < drill.kills % len(cases))
    with ThreadPoolExecutor(drill.at_once) as pool:
        found = list(pool.map(lambda number: _case(drill, *cases[number], share(number), number % 2 == 1), range(len(cases))))
    met = Counter(kill for kills, _ in found for kill in kills)
    moments, whom = (Counter(word for kill in met.elements() for word in [kill.split(": ")[place]]) for place in (0, 1))
    told = [", ".join(f"{count} {word}" for word, count in sorted(counter.items())) for counter in (moments, whom)]
    total = sum(met.values())
    drill.tell(f"{total} kills met a job at work", total >= drill.kills, f"{told[0]}; {told[1]}; {sum(count for _, count in found)} numbers and tensors")


def _case(drill: Drill, method: str, layout: str, kills: int, in_background: bool) -> tuple[list[str], int]:
    """Kills that met a job at work, and how many numbers were compared."""
    name, rng = f"{method} {layout}{' --async-save' if in_background else ''}", drill.random(method, layout)
    reference = Job(drill.lab / _slug(method, layout), ())
    job = drill.job(f"{_slug(method, layout)}-killed", method, LAYOUTS[layout] | ({"async-save": True} if in_background else {}))
    moments = sorted(rng.sample(MOMENTS, kills) if kills <= len(MOMENTS) else rng.choices(MOMENTS, k=kills), key=MOMENTS[3:].count)
    done = []
    try:
        for moment in moments:
            done += _kill_once(drill, name, job, moment, rng)
        code = job.start().end(600)
    except Exception as error:
        drill.tell(name, False, f"{type(error).__name__}: {error}")
        return done, 0
    finally:
        job.clean_up()
    drill.tell(f"{name}, killed at {', '.join(done)}", code == 0, f"exit code {code}{'' if code == 0 else f': {job.last_words}'}")
    return done, drill.compare(name, job, reference) if code == 0 else 0


def _unbroken(layout, words, said) -> None:
    with said.open("a") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    run(layout, words)


def _slug(method: str, layout: str) -> str:
    return f"{method}-{layout.replace(' ', '-')}"


def _kill_once(drill: Drill, name: str, job: Job, moment: str, rng) -> list[str]:
    """Who, and when; nothing where the job was faster, so many times. The latest checkpoint is no older than it was, and whole."""
    who = rng.choice(["0", "1", "agent"])
    for _ in range(TRIES):
        before = read_latest(job.save / "checkpoints") or 0
        job.start()
        try:
            job.wait_for(_happens(job, moment, rng), 300, look=0.002 if moment in ("write", "export") else 0.02)
            if moment != "start":
                time.sleep(rng.random() * 0.03)
            is_killed = _kill(job, who)
        except AssertionError:
            is_killed = False
        if not is_killed:  # it was faster
            if job.process.wait(300):
                drill.tell(name, False, f"not killed, exit code {job.process.returncode}: {job.last_words}")
            shutil.rmtree(job.save / "hf", ignore_errors=True)  # it exports once more
            continue
        job.process.wait(300)
        latest = read_latest(job.save / "checkpoints") or 0
        if latest:
            NativeCheckpoint(job.save / "checkpoints").verify()
        if latest < before:
            drill.tell(name, False, f"checkpoint {before} was there before, {latest} is the latest now")
        return [f"{moment}: {'rank ' if who != 'agent' else ''}{who}"]
    return []


def _kill(job: Job, who: str) -> bool:
    """False: it has just ended.

    Raises:
        TimeoutError: its ranks outlive their launcher.
    """
    try:
        job.kill(who)
    except (ProcessLookupError, IndexError, FileNotFoundError):
        return False
    except AssertionError as error:
        raise TimeoutError(f"ranks outlive their launcher: {error}") from error
    return True


def _happens(job: Job, moment: str, rng) -> Callable[[], bool]:
    first, due, begun = job.iteration, rng.random() * START_SECONDS, time.monotonic()
    target = min(first + rng.randrange(1, 6), LAST - 1)
    checkpoints, hidden_export = job.save / "checkpoints", job.save / ".hf.partial"
    return {
        "start": lambda: (len(job.ranks) == 2 and time.monotonic() - begun > due) or job.iteration > first,
        "iteration": lambda: job.iteration >= target,
        "write": lambda: any(checkpoints.glob(".iter_*.partial")),
        "export": hidden_export.exists,
    }[moment]
