"""Every byte of a checkpoint counts: whatever is damaged or missing is named before a weight is loaded, and the way back is a way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import run_distributed
from test_trainer import command, inputs, numbers, run  # noqa: F401

from megakd import preflight
from megakd.checkpointing import native, space
from megakd.checkpointing.checksums import CHECKSUMS, SHARD, owner
from megakd.checkpointing.description import FILE
from megakd.checkpointing.export_hf import export_to_hf
from megakd.checkpointing.native import NativeCheckpoint, number_of, one_before, read_latest
from megakd.config import parse
from megakd.errors import UserError


@pytest.fixture(scope="module")
def finished(inputs):  # noqa: F811
    """A run over two ranks, of which iterations 2 and 4 are saved."""
    run_distributed(run, 2, command(inputs, "done", "promptkd", tp=2), tp=2)
    return inputs / "done"


@pytest.fixture
def checkpoint(finished, tmp_path) -> Path:
    """A copy of its last iteration."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "iter_0000004"


def flipped(file: Path, place: float) -> None:
    """One bit of it."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a bit at the start": lambda file: flipped(file, 0.0),
    "a bit in the middle": lambda file: flipped(file, 0.5),
    "a bit at the end": lambda file: flipped(file, 1.0),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_every_file_is_missed_by_its_name(checkpoint, damage):
    """Of the list itself a flipped bit is another file's checksum, or name: then both are named."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", FILE, CHECKSUMS, "run_config.yaml"}
    for file in files:
        before = file.read_bytes()
        damage(file)
        with pytest.raises(UserError, match=rf"{file.name}.*; the newest other iteration that can be opened is 2; --resume 2 continues"):
            NativeCheckpoint(checkpoint.parent, flag="--save").verify()
        file.write_bytes(before)
    NativeCheckpoint(checkpoint.parent, flag="--save").verify()


def test_sha256sum_reads_the_list(checkpoint):
    assert subprocess.run(["sha256sum", "--check", "--strict", CHECKSUMS], cwd=checkpoint, capture_output=True).returncode == 0


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_all_files(checkpoint, ranks):
    shards = [path for path in checkpoint.iterdir() if SHARD.fullmatch(path.name)]
    assert [owner(path.name, 2) for path in sorted(shards)] == [0, 1]
    for shard in shards:
        flipped(shard, 0.7)
        native, found = NativeCheckpoint(checkpoint.parent, flag="--save"), []
        for rank in range(ranks):
            try:
                native.verify(rank=rank, ranks=ranks)
            except UserError:
                found.append(rank)
        assert found == [owner(shard.name, ranks)]
        flipped(shard, 0.7)


def test_an_export_is_not_made_of_a_damaged_checkpoint(checkpoint, tmp_path):
    flipped(checkpoint / "__1_0.distcp", 0.5)
    with pytest.raises(UserError, match=r"__1_0\.distcp: damaged, its checksum is not that in checksums\.sha256.*choose it with --iteration 2"):
        export_to_hf(checkpoint.parent, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_of_an_earlier_version_is_read_and_told(checkpoint, noted):
    (checkpoint / CHECKSUMS).unlink()
    (checkpoint / FILE).write_text((checkpoint / FILE).read_text().replace('"format_version": 2', '"format_version": 1'))
    NativeCheckpoint(checkpoint.parent).verify()
    assert noted.messages[-1] == f"{checkpoint}: an earlier version wrote it without checksums; damage in its tensors would not be found"


def refused(layout, arguments):
    with pytest.raises(UserError, match=r"__1_0\.distcp: damaged.*; --resume 2 continues from it$"):
        run(layout, arguments)


def test_damaged_weights_are_refused_on_all_ranks_and_the_previous_iteration_gives_the_same_run(inputs, finished):  # noqa: F811
    """The damage is in rank 1's share, and both hear of it; what the next run removes is there too."""
    broken = inputs / "broken"
    shutil.copytree(finished, broken)
    flipped(broken / "checkpoints" / "iter_0000004" / "__1_0.distcp", 0.5)
    run_distributed(refused, 2, command(inputs, "broken", "promptkd", tp=2), tp=2)
    for left in (broken / ".hf.partial", broken / "checkpoints" / ".iter_0000003.partial"):
        left.mkdir()
    run_distributed(run, 2, command(inputs, "broken", "promptkd", tp=2, resume="previous"), tp=2)
    assert numbers(broken) == numbers(finished)
    assert (broken / "hf" / "model.safetensors").read_bytes() == (finished / "hf" / "model.safetensors").read_bytes()
    assert not list(broken.rglob(".*partial"))
    with pytest.raises(UserError, match=r"--resume previous: .* holds no other iteration than 2 that can be opened; leave it out"):
        shutil.rmtree(broken / "checkpoints" / "iter_0000004")
        (broken / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2\n")
        preflight.check_run_folder(parse(command(inputs, "broken", "promptkd", tp=2, resume="previous")))


def test_a_run_goes_on_from_the_iteration_that_is_asked_for(tmp_path, monkeypatch):
    """The one before a lost one, else the newest of all; by number the one that has it."""
    for iteration in (1, 2, 3, 4):
        (tmp_path / "checkpoints" / f"iter_000000{iteration}").mkdir(parents=True)
    monkeypatch.setattr(native, "is_whole", lambda folder: not folder.name.endswith("4"))
    before = {lost: one_before(tmp_path / "checkpoints" / f"iter_000000{lost}") for lost in (1, 2, 3)}
    assert {lost: number_of(found) for lost, found in before.items()} == {1: 3, 2: 1, 3: 2}
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("3\n")
    asked = lambda resume: preflight.iteration_to_resume(parse(command(tmp_path, ".", "sft", resume=resume)))
    assert {resume: asked(resume) for resume in ("latest", "previous", "1")} == {"latest": 3, "previous": 2, "1": 1}


def has_no_room(layout, arguments):
    """On rank 0 alone, whose disk it is."""
    space.shutil = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=12345 if layout.tp_rank == 0 else 1 << 60))
    with pytest.raises(UserError, match=r"iter_0000002: a checkpoint takes 0\.\d+ GiB, and 0\.000 GiB are free; free some space$"):
        run(layout, arguments)


def test_a_full_disk_is_told_before_anything_is_written(inputs):  # noqa: F811
    run_distributed(has_no_room, 2, command(inputs, "full", "sft"), tp=2)
    assert not list((inputs / "full").rglob("iter_*")) and read_latest(inputs / "full" / "checkpoints") is None


def test_room_for_a_checkpoint_is_what_it_takes(finished, inputs, capfd):  # noqa: F811
    run_distributed(measure, 2, command(inputs, "measured", "promptkd", tp=2, **{"train-iters": 2}), tp=2)
    needed = int(capfd.readouterr().out.splitlines()[-1])
    taken = sum(path.stat().st_size for path in (inputs / "measured" / "checkpoints" / "iter_0000002").rglob("*") if path.is_file())
    assert taken < needed < 1.5 * taken + space.BESIDE


def measure(layout, arguments):
    check, said = space._check_room, []
    space._check_room = lambda target, needed: said.append(needed) or check(target, needed)
    run(layout, arguments)
    if layout.tp_rank == 0:
        print(said[0], flush=True)


def writes_too_much(layout, arguments):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    with pytest.raises(UserError, match=rf"{os.strerror(errno.EFBIG)}; raise the limit of a file's size: a checkpoint takes 0\.\d+ GiB"):
        run(layout, arguments)


def test_a_write_that_fails_says_what_was_needed_and_leaves_the_previous_checkpoint(inputs, finished):  # noqa: F811
    shutil.copytree(finished, inputs / "limited")
    shutil.rmtree(inputs / "limited" / "checkpoints" / "iter_0000004")
    (inputs / "limited" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("2\n")
    run_distributed(writes_too_much, 2, command(inputs, "limited", "promptkd", tp=2), tp=2)
    checkpoints = inputs / "limited" / "checkpoints"
    assert read_latest(checkpoints) == 2 and [path.name for path in checkpoints.iterdir() if path.is_dir()] == ["iter_0000002"]
    NativeCheckpoint(checkpoints).verify()
