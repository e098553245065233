"""A rank that has ended or stands still ends the job soon, in one line that names it."""

from __future__ import annotations

import datetime
import os
import re
import signal
import time

import pytest
import torch.distributed as dist
from distributed import CONTEXT, _rank
from test_trainer import command, inputs  # noqa: F401

from megakd import trainer
from megakd.config import parse
from megakd.errors import LostRankError, fail, told_in_one_line
from megakd.runtime.peers import collective_of
from megakd.runtime.waiting import waiting


def run(layout, arguments, lost, number):
    """One run; rank `lost` gets the signal after its second iteration."""

    def on_iteration(iteration, metrics):
        if iteration == 2 and os.environ["RANK"] == str(lost):
            os.kill(os.getpid(), number)
            time.sleep(60)

    os.environ["WORLD_SIZE"] = "2"
    try:
        trainer.train(parse(arguments), callbacks=trainer.Callbacks(on_iteration=on_iteration))
    except LostRankError as error:
        return str(error)


ENDED, STILL = "has ended", r"stands still, for 0:00:04\.500000 \(--timeout-minutes\)"


@pytest.mark.parametrize("method, flags, number, what", [
    ("sft", {}, signal.SIGKILL, ENDED),
    ("sft", {}, signal.SIGSTOP, STILL),
    ("kd", {"teacher-ranks": 1}, signal.SIGKILL, ENDED),  # a teacher's own rank waits for requests of one that stands still: it may be busy
])  # fmt: skip
def test_a_lost_rank_is_named(inputs, tmp_path, monkeypatch, method, flags, number, what):  # noqa: F811
    lost = 1 if method == "sft" else 0  # a teacher's own rank has no iterations to count
    arguments = command(inputs, f"{method}-{number}", method, **flags, **{"timeout-minutes": 0.075, "train-iters": 50})
    monkeypatch.setattr(waiting, "timeout", datetime.timedelta(minutes=0.075))  # of the groups that _rank forms before there is a run
    results = CONTEXT.SimpleQueue()
    ranks = [CONTEXT.Process(target=_rank, args=(rank, 2, str(tmp_path), run, (arguments, lost, number), 1, 1, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        assert results._reader.poll(60), "the job went on"
        rank, (error, said) = results.get()
    finally:
        for process in ranks:
            process.kill()
    assert error is None and rank == 1 - lost
    assert re.fullmatch(
        rf"rank {lost} \(process {ranks[lost].pid} on \S+\) {what}, while rank {rank} waited in \w+; the same command continues from the last checkpoint", said
    ), said


def test_a_lost_rank_may_be_started_again_and_a_mistake_may_not(capsys):
    """Launchers go by the exit code."""
    with pytest.raises(SystemExit) as exit, told_in_one_line():
        raise LostRankError("rank 1 has ended")
    assert exit.value.code == 75
    with pytest.raises(SystemExit) as exit:
        fail("--lr: no")
    assert exit.value.code == 2


def test_the_collective_is_the_function_of_torch_that_was_called():
    try:
        dist.all_gather_object([], None)
    except ValueError as error:
        assert collective_of(error) == "all_gather_object"
    assert collective_of(ValueError()) == "a collective"
