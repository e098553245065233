"""--async-save: a checkpoint is written beside training, with every guarantee of one that training waits for."""

from __future__ import annotations

import errno
import os
import signal
import tempfile
import threading
from pathlib import Path

import pytest
from distributed import CONTEXT, _rank, run_distributed
from test_stop import run as run_until_told
from test_stop import wait_until
from test_trainer import command, inputs, numbers, run, without_figures  # noqa: F401

from megakd import trainer
from megakd.checkpointing import publish, space, torch_dist_save, torch_dist_writer, training
from megakd.checkpointing.native import NativeCheckpoint, read_latest
from megakd.config import parse
from megakd.errors import UserError
from megakd.runtime.background import background

FLAGS = {"train-iters": 6, "save-interval": 2, "eval-interval": 3}
SLOW = FLAGS | {"async-save": True}


def after(layout, arguments, iteration, happens, what=lambda: None):
    """A run that waits on this rank, when `iteration` is logged, until something `happens`; then does something."""

    def on_iteration(done, metrics):
        if done == iteration:
            wait_until(happens)
            what()

    without_figures()
    trainer.train(parse(arguments), callbacks=trainer.Callbacks(on_iteration=on_iteration))


def held_back(where, name: str, gate: threading.Event, *, rank: int = 0) -> None:
    """Let what runs in the background stop at `gate`, on one rank, before it calls a function."""
    function = getattr(where, name)

    def waits(*arguments, **options):
        if os.environ["RANK"] == str(rank) and threading.current_thread().name == "background":
            gate.wait(60)
        return function(*arguments, **options)

    setattr(where, name, waits)


def written_two_iterations_later(layout, arguments, folder):
    """The writing of iteration 2 waits, on both ranks, until the students have made step 3."""
    gate = threading.Event()
    held_back(torch_dist_save.Writer, "write_data", gate, rank=layout.tp_rank)
    seen = []
    after(layout, arguments, 3, lambda: True, lambda: (seen.append(read_latest(folder / "checkpoints")), gate.set()))
    return seen


@pytest.mark.parametrize("method, flags", [("promptkd", {"keep-best": "valid/lm_loss"}), ("kd", {"use-distributed-optimizer": True})])
def test_what_is_written_beside_training_is_what_would_have_been_written_before_it_went_on(inputs, method, flags):  # noqa: F811
    tp = 1 if "use-distributed-optimizer" in flags else 2
    folders = {name: inputs / f"{method}-{name}" for name in ("waits", "beside")}
    run_distributed(run, 2, command(inputs, folders["waits"].name, method, tp=tp, **FLAGS | flags), tp=tp)
    arguments = command(inputs, folders["beside"].name, method, tp=tp, **SLOW | flags)
    assert run_distributed(written_two_iterations_later, 2, arguments, folders["beside"], tp=tp) == [[None]] * 2, "not seen before it is there"
    assert numbers(folders["beside"]) == numbers(folders["waits"])
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.distcp")) for folder in folders.values()]
    assert files[0] == files[1] and len(files[0]) == 3 * 2
    for name in [*files[0], Path("hf/model.safetensors"), *([Path("best/model.safetensors")] if "keep-best" in flags else [])]:
        assert (folders["beside"] / name).read_bytes() == (folders["waits"] / name).read_bytes(), name
    for iteration in (2, 4, 6):
        NativeCheckpoint(folders["beside"] / "checkpoints", iteration=iteration).verify()


MOMENTS = {  # of the writing of iteration 4, at which rank 0 or 1 stands when both are killed; the checkpoint that is then the latest
    "before its tensors are written, rank 1": (torch_dist_save.Writer, "write_data", 1, 2),
    "before it is the latest": (training, "write_latest", 0, 2),
    "before older ones go": (training, "remove_older", 0, 4),
}


def killed_while_writing(layout, arguments, moment):
    where, name, rank, _ = moment
    there, function, calls = threading.Event(), getattr(where, name), []

    def second_time(*given, **options):
        calls.append(given)
        if len(calls) == 2 and os.environ["RANK"] == str(rank):
            there.set()
            threading.Event().wait()
        return function(*given, **options)

    setattr(where, name, second_time)
    is_there = lambda: there.is_set() or os.environ["RANK"] != str(rank)
    after(layout, arguments, 5, is_there, lambda: os.environ["RANK"] == str(rank) and os.kill(os.getpid(), signal.SIGKILL))


@pytest.fixture(scope="module")
def unbroken(inputs):  # noqa: F811
    run_distributed(run, 2, command(inputs, "unbroken", "sft", **FLAGS), tp=2)
    return inputs / "unbroken"


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_a_rank_killed_while_a_checkpoint_is_written_leaves_the_one_before(inputs, unbroken, moment):  # noqa: F811
    save = inputs / f"killed-{moment[1]}"
    arguments = command(inputs, save.name, "sft", **SLOW, **{"keep-last": 1})
    assert -signal.SIGKILL in exit_codes(killed_while_writing, 2, arguments, moment)
    assert read_latest(save / "checkpoints") == moment[-1]
    NativeCheckpoint(save / "checkpoints").verify()
    run_distributed(run, 2, arguments, tp=2)
    assert numbers(save) == numbers(unbroken) and not list(save.rglob(".*partial"))
    assert [path.name for path in (save / "checkpoints").glob("*iter_*")] == ["iter_0000006"]


def exit_codes(fn, world_size, *given) -> list[int]:
    """Of ranks that do not answer."""
    with tempfile.TemporaryDirectory() as folder:
        results = CONTEXT.SimpleQueue()
        ranks = [CONTEXT.Process(target=_rank, args=(i, world_size, folder, fn, given, 2, 1, results)) for i in range(world_size)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
    return [rank.exitcode for rank in ranks]


def fails_on_one_rank(layout, arguments):
    """In the second checkpoint, in a rank's own file: told on both ranks, before a further checkpoint is due."""
    function, calls = torch_dist_save.dcp.FileSystemWriter.write_data, []

    def full(self, plan, planner):
        calls.append(plan)
        if len(calls) == 2 and layout.tp_rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(self, plan, planner)

    torch_dist_save.dcp.FileSystemWriter.write_data = full
    with pytest.raises(UserError, match=rf"iter_0000004.*{os.strerror(errno.ENOSPC)}; free some space: a checkpoint takes 0\.\d+ GiB"):
        after(layout, arguments, 5, lambda: background.outcome.done())


def test_a_write_that_fails_ends_the_run_with_one_line_and_leaves_the_one_before(inputs):  # noqa: F811
    run_distributed(fails_on_one_rank, 2, command(inputs, "fails", "sft", **SLOW | {"train-iters": 100, "save-interval": 2}), tp=2)
    checkpoints = inputs / "fails" / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("*iter_*")) == ["iter_0000002"] and read_latest(checkpoints) == 2
    NativeCheckpoint(checkpoints).verify()
    assert numbers(inputs / "fails")[-1]["iteration"] == 5, "the iteration that was at work was the last"


def has_no_room(layout, arguments):
    from types import SimpleNamespace

    space.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=12345))
    with pytest.raises(UserError, match=r"iter_0000002: a checkpoint takes 0\.\d+ GiB, and 0\.000 GiB are free; free some space$"):
        run(layout, arguments)


def test_room_is_asked_for_before_anything_is_copied(inputs):  # noqa: F811
    run_distributed(has_no_room, 1, command(inputs, "full", "sft", **SLOW))
    assert not list((inputs / "full").rglob("*iter_*"))


def told_while_writing(layout, arguments):
    """A signal to rank 1 while rank 0's write of iteration 2 waits; it goes on when the run has noticed."""
    gate, leave = threading.Event(), trainer.Trainer._leave
    held_back(training, "write_latest", gate)
    trainer.Trainer._leave = lambda self: (gate.set(), leave(self))
    return run_until_told(layout, arguments, 1, 3)


def test_a_run_that_is_told_to_stop_waits_for_what_is_being_written(inputs, unbroken):  # noqa: F811
    arguments = command(inputs, "told", "sft", **SLOW)
    assert run_distributed(told_while_writing, 2, arguments, tp=2) == [[1, 2, 3]] * 2
    assert read_latest(inputs / "told" / "checkpoints") == 3
    run_distributed(run, 2, arguments, tp=2)
    assert numbers(inputs / "told") == numbers(unbroken)


def test_ranks_of_the_teachers_own_take_part(inputs):  # noqa: F811
    for name, flags in {"own-waits": FLAGS, "own-beside": SLOW}.items():
        run_distributed(run, 2, command(inputs, name, "kd", **flags, **{"teacher-ranks": 1}))
    assert numbers(inputs / "own-beside") == numbers(inputs / "own-waits")
    NativeCheckpoint(inputs / "own-beside" / "checkpoints").verify()


def said_of(layout, arguments, happens) -> str:
    """What the run says on this rank, of which rank 0 has met something."""
    if os.environ["RANK"] == "0":
        happens(layout)
    with pytest.raises(UserError) as error:
        run(layout, arguments)
    return str(error.value)


def no_room(*given, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room_beside_tensors(layout):
    training.write_hf_folder = no_room


def no_room_for_numbers(layout):
    torch_dist_writer.COMMON = "/dev/full"  # where a folder's name is put before it


def no_room_for_a_name(layout):
    publish.take_name = no_room


def no_folder(layout):
    publish.missing_parents = lambda target: publish.hidden(target).parent.mkdir(parents=True) or publish.hidden(target).touch() or []


def no_export(layout):
    def refuses(*given, **options):
        raise UserError("no export")

    trainer.export_to_hf = refuses


ALONE = {  # what rank 0 alone meets, in a run that waits for its checkpoints and in one that does not; and what all say of it
    "tensors, beside": (no_room_beside_tensors, SLOW, os.strerror(errno.ENOSPC)),
    "tensors": (no_room_beside_tensors, FLAGS, os.strerror(errno.ENOSPC)),
    "numbers": (no_room_for_numbers, FLAGS, os.strerror(errno.ENOSPC)),
    "name, beside": (no_room_for_a_name, SLOW, os.strerror(errno.ENOSPC)),
    "folder": (no_folder, FLAGS, os.strerror(errno.EEXIST)),
    "export": (no_export, FLAGS, "no export"),
}


@pytest.mark.parametrize("happens, flags, said", ALONE.values(), ids=ALONE)
def test_what_rank_zero_alone_meets_while_it_saves_or_exports_all_ranks_say(inputs, happens, flags, said):  # noqa: F811
    found = run_distributed(said_of, 2, command(inputs, f"alone-{happens.__name__}-{flags is SLOW}", "sft", **flags), happens, tp=2)
    assert found[0] == found[1] and said in found[0], found


def ended_by_its_caller(layout, arguments) -> str:
    """While a checkpoint has failed, of which nobody has asked."""
    gate = threading.Event()
    publish.take_name = lambda *given: gate.wait(60) and no_room()

    def end():
        gate.set()
        wait_until(background.outcome.done)
        raise UserError("enough")

    try:
        after(layout, arguments, 3, lambda: True, end)
    except UserError as error:
        return str(error)
    return "dismissed"


def test_of_two_errors_the_first_is_told_and_the_teachers_own_ranks_are_dismissed(inputs):  # noqa: F811
    arguments = command(inputs, "two-errors", "kd", **SLOW, **{"teacher-ranks": 1})
    assert run_distributed(ended_by_its_caller, 2, arguments) == ["enough", "dismissed"]
