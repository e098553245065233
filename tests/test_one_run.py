"""One folder, one run, one set of settings on all ranks."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, replace

import pytest
from distributed import CONTEXT, run_distributed
from test_trainer import command, inputs, run  # noqa: F401

from megakd.errors import UserError
from megakd.runtime.lock import LOCK, Holder, locked, release, take


@pytest.fixture
def somebody():
    """A process that lives."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def held(folder, **changes) -> Holder:
    folder.mkdir(exist_ok=True)
    holder = replace(Holder.this(), **changes)
    (folder / LOCK).write_text(json.dumps(asdict(holder)))
    return holder


def ticks(pid: int) -> int:
    return int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[19])


def test_a_folder_at_which_a_run_is_at_work_is_refused_with_its_name(tmp_path, somebody):
    held(tmp_path, process=somebody, started=ticks(somebody), since="2026-01-31 12:00:00")
    host, file = os.uname().nodename, tmp_path / LOCK
    message = (
        f"--save {tmp_path}: process {somebody} on {host} has been at work in it since 2026-01-31 12:00:00; let it end, "
        f"remove {file} if it has ended already, or give another --save"
    )
    with pytest.raises(UserError) as error, locked(tmp_path):
        pass
    assert str(error.value) == message and Holder.read(file.read_text()).process == somebody


def test_of_two_that_start_together_one_waits_until_the_other_has_written_its_name(tmp_path):
    with (tmp_path / LOCK).open("a+") as stream, ThreadPoolExecutor() as pool:
        fcntl.flock(stream, fcntl.LOCK_EX)
        other = pool.submit(take, tmp_path, Holder.this(), "--save")
        assert not wait([other], timeout=0.3).done
        stream.write(json.dumps(asdict(replace(Holder.this(), host="elsewhere"))) + "\n")
        stream.flush()
        fcntl.flock(stream, fcntl.LOCK_UN)
        with pytest.raises(UserError, match="on elsewhere has been at work in it"):
            other.result(timeout=20)


@pytest.mark.parametrize("changes, is_refused", [
    ({"host": "elsewhere"}, True),
    ({"host": "elsewhere", "job": "slurm 7"}, False),  # an earlier attempt, on another machine
    ({"job": "slurm 7"}, True),  # two runs of one allocation
    ({"started": 1}, False),  # the number belongs to another process now
    ({"process": 2**22 + 1}, False),
])  # fmt: skip
def test_who_has_ended_is_told_from_who_may_be_at_work(tmp_path, somebody, changes, is_refused):
    holder = held(tmp_path, **({"process": somebody, "started": ticks(somebody)} | changes))
    assert holder.is_at_work(replace(Holder.this(), job="slurm 7")) == is_refused


def test_a_lock_is_left_with_the_block_and_nothing_else_stays(tmp_path):
    with locked(tmp_path / "new" / "run"):
        me = Holder.read((tmp_path / "new" / "run" / LOCK).read_text())
        assert me == replace(Holder.this(), since=me.since)
    assert not (tmp_path / "new").exists()
    (tmp_path / LOCK).write_text('{"host"')  # of a machine that went away while it wrote
    take(tmp_path, me, "--save")
    release(tmp_path, replace(me, process=1))
    assert (tmp_path / LOCK).exists(), "another's"
    release(tmp_path, me)
    assert not (tmp_path / LOCK).exists()


def try_to_take(folder, ready, answers, done):
    ready.wait()
    try:
        take(folder, Holder.this(), "--save")
        answers.put("mine")
    except UserError:
        answers.put("another's")
    done.wait()


def test_of_runs_that_begin_together_one_begins(tmp_path):
    ready, answers, done = CONTEXT.Barrier(4), CONTEXT.SimpleQueue(), CONTEXT.Barrier(5)
    runs = [CONTEXT.Process(target=try_to_take, args=(tmp_path, ready, answers, done)) for _ in range(4)]
    for process in runs:
        process.start()
    assert sorted(answers.get() for _ in runs) == ["another's"] * 3 + ["mine"]
    done.wait(20)
    for process in runs:
        process.join(20)


def other_settings(layout, arguments, flag, value):
    if layout.dp_rank == 1:
        arguments = [*arguments, f"--{flag}", value]
    with pytest.raises(UserError) as error:
        run(layout, arguments)
    return str(error.value)


@pytest.mark.parametrize("flag, value, usual", [("lr", "0.002", "0.001"), ("seed", "7", "1234"), ("tp", "2", "1")])
def test_a_rank_that_was_started_otherwise_is_named_with_its_flag(inputs, flag, value, usual):  # noqa: F811
    """Before groups are formed, in which a rank with another layout would wait for ever."""
    said = run_distributed(other_settings, 2, command(inputs, "otherwise", "sft"), flag, value)
    name = {"tp": "--tensor-model-parallel-size"}.get(flag, f"--{flag}")
    assert said[0] == said[1] == (
        f"{name} {value} on rank 1 ({os.uname().nodename}) differs from the {usual} of rank 0; start all ranks with the same command"
    )
    assert not (inputs / "otherwise").exists()


def at_work(layout, arguments):
    """On rank 0, which holds the lock, another process is at work; rank 1 hears of it."""
    with pytest.raises(UserError, match="has been at work in it since"):
        run(layout, arguments)


def test_a_run_is_refused_where_another_is_at_work_on_all_ranks(inputs, somebody):  # noqa: F811
    held(inputs / "taken", process=somebody, started=ticks(somebody))
    run_distributed(at_work, 2, command(inputs, "taken", "sft"))
    assert sorted(path.name for path in (inputs / "taken").iterdir()) == [LOCK]
