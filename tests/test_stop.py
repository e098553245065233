"""Told to stop: the iteration is finished and saved, every rank ends, and the same command goes on to the same numbers."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed
import pytest
from distributed import run_distributed
from test_trainer import command, inputs, numbers, without_figures  # noqa: F401

import megakd
from megakd import trainer
from megakd.checkpointing.native import read_latest
from megakd.config import parse
from megakd.runtime import stop
from megakd.runtime.peers import state_of


def run(layout, arguments, told=None, after=None):
    """One run on this rank, of which rank `told` gets a signal when iteration `after` is logged; how many iterations it has made here."""
    rank, made = int(os.environ["RANK"]), []
    without_figures()
    stop.listen(["SIGUSR1"])

    def on_iteration(iteration, metrics):
        made.append(iteration)
        if (rank, iteration) == (told, after):
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(lambda: stop.requests.reason)

    trainer.train(parse(arguments), callbacks=trainer.Callbacks(on_iteration=on_iteration))
    return made


def wait_until(happens):
    end = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("method, flags, told, left", [
    ("promptkd", {}, 1, 2),
    ("minillm", {"num-rollouts": 8, "ppo-epochs": 3, "save-interval": 3}, 0, 3),
])  # fmt: skip
def test_a_signal_to_one_rank_saves_what_all_have_done(inputs, method, flags, told, left):  # noqa: F811
    """MiniLLM at the end of its phase, whose responses are in no checkpoint."""
    flags = {"save-interval": 100, "tp": 2} | flags
    whole, broken = (command(inputs, f"{method}-{name}", method, **flags) for name in ("whole", "told"))
    run_distributed(run, 2, whole, tp=2)
    assert run_distributed(run, 2, broken, told, 2, tp=2) == [list(range(1, left + 1))] * 2
    assert read_latest(inputs / f"{method}-told" / "checkpoints") == left and not (inputs / f"{method}-told" / "hf").exists()
    assert run_distributed(run, 2, broken, tp=2) == [list(range(left + 1, 5))] * 2
    assert numbers(inputs / f"{method}-told") == numbers(inputs / f"{method}-whole")


def serve_until_told(layout, arguments):
    """Rank 1 is the teacher's own, and is the one that hears of it."""
    os.environ["WORLD_SIZE"] = "2"
    stop.listen([])
    if os.environ["RANK"] == "1":
        serve = trainer.serve
        trainer.serve = lambda *given: os.kill(os.getpid(), signal.SIGTERM) or wait_until(lambda: stop.requests.reason) or serve(*given)
    trainer.train(parse(arguments))


def test_a_signal_to_a_rank_of_the_teachers_own_ends_the_run(inputs, capfd):  # noqa: F811
    run_distributed(serve_until_told, 2, command(inputs, "own", "kd", **{"teacher-ranks": 1}))
    said = capfd.readouterr().out.splitlines()[-1]
    assert said == f"SIGTERM: ended after no iteration; the same command continues {inputs}/own"


def test_the_clock_ends_a_run_that_the_same_command_continues(inputs, capfd):  # noqa: F811
    limited = command(inputs, "clock", "sft", **{"exit-duration-in-mins": 1e-9})
    assert run_distributed(run, 1, limited) == [[]]
    assert capfd.readouterr().out.splitlines()[-1].startswith("--exit-duration-in-mins: ended after no iteration")
    assert run_distributed(run, 1, command(inputs, "clock", "sft")) == [[1, 2, 3, 4]]


BLOCKED = """
import ctypes
from megakd.runtime import stop
stop.TOGETHER = 0.2
stop.listen(["SIGHUP"])
if not {lost}: stop.requests.is_lost = lambda: False
print("listening", flush=True)
for _ in range(8): ctypes.CDLL(None).sleep(60)  # each signal cuts one short: there are more of these than signals
"""


@pytest.mark.parametrize("lost, signals", [(False, [signal.SIGHUP, signal.SIGTERM]), (True, [signal.SIGTERM])])
def test_a_second_signal_ends_at_once_and_so_does_the_first_when_a_rank_is_lost(lost, signals):
    """Also where the main thread waits inside a library and runs no Python."""
    with subprocess.Popen([sys.executable, "-c", BLOCKED.format(lost=lost)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listening\n"
        for number in signals:
            assert process.poll() is None
            process.send_signal(number)
            process.send_signal(number)  # what comes together is one request
            time.sleep(0.5)
        notes = process.communicate(timeout=10)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert notes.splitlines() == ([] if lost else ["note: SIGHUP: the iteration is finished and saved first; a second signal ends at once"])


def be_orphaned_while_importing(pipe: int) -> None:
    """A rank whose launcher ends before it listens. The pipe closes when it ends."""
    parent = megakd.STARTED_BY = os.getpid()
    if os.fork():
        os._exit(0)
    wait_until(lambda: os.getppid() != parent)
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    stop.PATROL = 0.05
    stop.listen([])
    os.write(pipe, b"listening")
    time.sleep(60)
    os._exit(0)


def test_a_rank_whose_launcher_ended_before_it_listened_ends_too():
    reader, writer = os.pipe()
    middle = distributed.CONTEXT.Process(target=be_orphaned_while_importing, args=(writer,))
    middle.start(), middle.join()
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert select.select([pipe], [], [], 20)[0] and pipe.read(9) == b"listening"
        assert select.select([pipe], [], [], 20)[0] and pipe.read() == b""


def test_who_started_the_process_is_noted_before_anything_that_takes_seconds_is_imported(python):
    done = subprocess.run([python, "-c", "import os, megakd; assert megakd.STARTED_BY == os.getppid()"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for script in ("pretrain_kd.py", "evaluate.py"):
        lines = (Path(__file__).parents[1] / "scripts" / script).read_text().splitlines()
        first = next(line for line in lines if line.startswith("from megakd"))
        assert first.startswith("from megakd.config import "), "which imports no torch"


def test_a_process_is_told_from_one_that_stands_still_or_has_ended():
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert state_of(child.pid) in "RSD"
        child.send_signal(signal.SIGSTOP)
        wait_until(lambda: state_of(child.pid) == "T")
    finally:
        child.kill()
    wait_until(lambda: state_of(child.pid) == "Z")
    child.wait()
    assert state_of(child.pid) == "X"
