"""What people have is never written into or replaced: folders are new, empty or marked; files are continued by what began them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from distributed import run_distributed
from megakd_benchmarks import report
from safetensors.torch import load_file, save_file
from tasks import make_rows
from tiny import tiny_folder
from train_tokenizer import train_tokenizer

from megakd import loading, preflight, trainer
from megakd.checkpointing import fingerprint, native
from megakd.checkpointing.export_hf import export_to_hf
from megakd.checkpointing.import_hf import hf_to_native
from megakd.checkpointing.native import read_latest
from megakd.checkpointing.publish import published
from megakd.config import Config, EvaluateConfig, GenerateConfig, ResponseConfig, parse
from megakd.errors import UserError
from megakd.evaluation.evaluator import evaluate
from megakd.evaluation.report import check_folder
from megakd.generation.write_responses import ResponseFile, write_responses
from megakd.reporting.jsonl import JsonLines, dump, read_jsonl
from megakd.reporting.own_folder import MARKER, OwnFolder

ROOT = Path(__file__).parents[1]
OURS = ("samples.jsonl", "metrics.jsonl", "rollouts.jsonl", "answers.jsonl", "results.json", "exposure_bias.jsonl", "config.yaml")


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A student, a teacher and a little data."""
    root = tmp_path_factory.mktemp("lab")
    rows = make_rows(40, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(root / name, "gpt2", layers=1, vocab_size=len(tokenizer), seed=seed)
        tokenizer.save_pretrained(root / name)
    lines = [json.dumps({"prompt": row["prompt"], "response": row["response"]}) + "\n" for row in rows]
    (root / "train.jsonl").write_text("".join(lines))
    (root / "valid.jsonl").write_text("".join(lines[:8]))
    return root


def training(lab: Path, save: Path, **flags) -> list[str]:
    settings = {
        "method": "sft", "model": lab / "student", "train-data": lab / "train.jsonl", "max-length": 16, "max-prompt-length": 10,
        "train-iters": 2, "micro-batch-size": 2, "global-batch-size": 8, "lr": "1e-3", "save": save,
    }  # fmt: skip
    return [str(word) for name, value in (settings | flags).items() for word in (f"--{name}", *([] if value is True else [value]))]


def run_config(lab: Path, save: Path, **flags) -> Config:
    return parse(training(lab, save, **flags))


def evaluation(lab: Path, save: Path, **changes) -> EvaluateConfig:
    responses = ResponseConfig(max_prompt_length=10, max_new_tokens=4, greedy=True)
    return EvaluateConfig(model=str(lab / "student"), data=(str(lab / "valid.jsonl"),), save=str(save), responses=responses, **changes)


def generation(lab: Path, save: Path, **changes) -> GenerateConfig:
    settings = {"model": str(lab / "student"), "data": str(lab / "valid.jsonl"), "save": str(save)}
    return GenerateConfig(**settings | changes, responses=ResponseConfig(max_prompt_length=10, max_new_tokens=4))


def on_a_rank(layout, command, config):
    os.environ["WORLD_SIZE"] = "1"
    return command(config)


def run(command, config):
    return run_distributed(on_a_rank, 1, command, config)[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- folders of other people


def refused(layout, lab: Path, folder: Path, monkeypatch) -> list[str]:
    """What each command says of a folder; none may load a weight."""
    os.environ["WORLD_SIZE"] = "1"
    monkeypatch.setattr(loading, "build_model", lambda *_, **__: pytest.fail("a model was built"))
    said = []
    for command, config in ((trainer.train, run_config(lab, folder)), (evaluate, evaluation(lab, folder))):
        with pytest.raises(UserError) as error:
            command(config)
        said.append(str(error.value))
    return said


@pytest.mark.parametrize("name", OURS)
def test_a_folder_with_files_of_ones_own_is_refused_and_untouched_whatever_they_are_called(lab, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text('lr: 1e-3\n{"mine": true}\n')
    before = contents(tmp_path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        (said,) = run_distributed(refused, 1, lab, tmp_path / "mine", monkeypatch)
    for line, command in zip(said, ("pretrain_kd.py", "evaluate.py")):
        assert line == f"--save {tmp_path}/mine holds {name}, and no {MARKER} says that {command} made it; give a new or an empty folder"
    assert contents(tmp_path) == before


def test_an_evaluation_leaves_the_answers_of_generate_alone(lab, tmp_path):
    runs = tmp_path / "runs"
    run(write_responses, generation(lab, runs / "answers.jsonl"))
    before = contents(runs)
    with pytest.raises(UserError, match=r"--save \S+runs holds answers.jsonl, and no megakd.json says that evaluate.py made it"):
        check_folder(evaluation(lab, runs))
    run(evaluate, evaluation(lab, runs / "evaluation"))
    assert before.items() <= contents(runs).items()


def test_hidden_files_and_logs_are_nobodys(tmp_path):
    (tmp_path / ".gitkeep").touch()
    (tmp_path / "slurm-17.out").touch()
    (tmp_path / "train.log").touch()
    assert not OwnFolder(tmp_path, "pretrain_kd.py").check()


def test_a_folder_of_another_command_is_named(tmp_path):
    OwnFolder(tmp_path, "evaluate.py").claim()
    (tmp_path / "results.json").touch()
    with pytest.raises(UserError, match=r"--save \S+ is a folder of evaluate.py; give pretrain_kd.py one of its own"):
        OwnFolder(tmp_path, "pretrain_kd.py").check()
    (tmp_path / MARKER).write_text("[]")
    with pytest.raises(UserError, match=rf"{MARKER}: names no command as its maker"):
        OwnFolder(tmp_path, "evaluate.py").check()
    (tmp_path / MARKER).write_text("{")
    with pytest.raises(UserError, match=rf"{MARKER}: not JSON .*; remove the file if the folder is to be used"):
        OwnFolder(tmp_path, "evaluate.py").check()


# ---- paths that cannot be written


def unwritable(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    (tmp_path / "file").touch()
    return {
        "a file": (tmp_path / "file", r"--save \S+/file is a file; give a folder of its own"),
        "under a file": (tmp_path / "file" / "a" / "b", r"--save \S+/file is a file, and \S+/file/a/b cannot lie under it; give a folder"),
        "a parent that cannot be made": (Path("/proc/nowhere/run"), r"--save /proc/nowhere/run: .*; "),
    }


@pytest.mark.parametrize("case", ["a file", "under a file", "a parent that cannot be made"])
def test_a_path_that_cannot_be_written_is_told_before_the_work_and_leaves_nothing(lab, tmp_path, case):
    path, message = unwritable(tmp_path)[case]
    before = sorted(tmp_path.rglob("*"))
    checks = [lambda: preflight.check_run_folder(run_config(lab, path)), lambda: check_folder(evaluation(lab, path))]
    checks += [lambda: hf_to_native(lab / "student", path, tp=1, pp=1), lambda: export_to_hf(lab / "native", path)]
    hf_to_native(lab / "student", lab / "native", tp=1, pp=1, force=True)
    for check in checks:
        with pytest.raises(UserError, match=message) as error:
            check()
        assert "\n" not in str(error.value)
    if case != "a file":
        with pytest.raises(UserError, match=r"--save \S+"):
            ResponseFile(generation(lab, path / "answers.jsonl"))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_the_place_of_an_answer_file_is_told(lab, tmp_path):
    with pytest.raises(UserError, match=r"--save \S+ is a folder; name a jsonl file, as \S+/answers.jsonl"):
        ResponseFile(generation(lab, tmp_path))


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_with_the_file_wherever_it_is_met(lab, tmp_path, monkeypatch):
    lines, answers = JsonLines(tmp_path / "metrics.jsonl"), ResponseFile(generation(lab, tmp_path / "answers.jsonl"))
    lines._file.close()
    lines._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=r"metrics.jsonl: No space left on device; free some space"):
        lines.append(1, {"loss/lm": 1.0})
    (tmp_path / "answers.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"--save \S+answers.jsonl: No space left on device; free some space"):
        answers.append([{"response": "a"}])
    monkeypatch.setattr("megakd.checkpointing.hf_writer.memoryview", full, raising=False)
    hf_to_native(lab / "student", tmp_path / "native", tp=1, pp=1)
    with pytest.raises(UserError, match=r"\S+/out: No space left on device; free some space"):
        export_to_hf(tmp_path / "native", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def limited(layout, arguments: list[str], size: int) -> str:
    """A run whose files may have `size` bytes: the system's own refusal, as of a full disk, in the middle of a checkpoint."""
    import resource

    os.environ["WORLD_SIZE"] = "1"
    begin = trainer.Trainer._begin_folder

    def then_limit(self):
        begin(self)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    trainer.Trainer._begin_folder = then_limit
    with pytest.raises(UserError) as error:
        trainer.train(parse(arguments))
    return str(error.value)


def test_a_checkpoint_that_finds_no_space_is_one_line_and_leaves_nothing_half_written(lab, tmp_path):
    arguments = training(lab, tmp_path / "broken")
    (said,) = run_distributed(limited, 1, arguments, 20_000)
    assert re.fullmatch(rf"{tmp_path}/broken/checkpoints/.iter_0000002.partial: File too large; .*", said)
    assert not list((tmp_path / "broken").glob("checkpoints/*"))


def test_a_conversion_that_finds_no_space_is_one_line_and_leaves_nothing(lab, tmp_path):
    """torch hides what the system says of a tensor larger than the file's buffer."""
    assert run_distributed(convert_in_little_space, 1, lab / "student", tmp_path / "native") == ["File too large; raise the limit of a file's size"]
    assert not list(tmp_path.iterdir())


def convert_in_little_space(layout, model: Path, target: Path) -> str:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    with pytest.raises(UserError) as error:
        hf_to_native(model, target, tp=1, pp=1)
    return str(error.value).removeprefix(f"{target}/iter_0000000: ")


def test_two_commands_that_write_one_folder_are_told(tmp_path):
    told = r"\S+/out: another command writes it too, and took away what was half-written; run one at a time"
    with pytest.raises(UserError, match=told), published(tmp_path / "out") as folder:
        shutil.rmtree(folder)  # as another command does that begins the same
        (folder / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError), published(tmp_path / "out"):  # a source that is not there is another matter
        (tmp_path / "source").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["prepare_data.py --num-train 8 --num-valid 4 --num-test 4", "quickstart.py"])
def test_the_scripts_that_fill_a_folder_leave_one_that_is_not_theirs_alone(tmp_path, command):
    (tmp_path / "train.jsonl").write_text("mine\n")
    script, *flags = command.split()
    words = [sys.executable, str(ROOT / "scripts" / script), *flags, "--out", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True)
    message = f"error: --out {tmp_path} holds train.jsonl, and no {MARKER} says that {script} made it; give a new or an empty folder\n"
    assert (done.returncode, done.stderr) == (2, message)
    assert contents(tmp_path) == {"train.jsonl": b"mine\n"}


def test_a_benchmark_adds_to_its_own_table_and_to_no_other(tmp_path):
    (tmp_path / "mine.csv").write_text("date,score\n1,2\n")
    (tmp_path / "figure.png").touch()
    for name in ("mine", "figure"):
        with pytest.raises(UserError, match=rf"--out \S+/{name}: {name}.csv or {name}.png is there, and no benchmark wrote it; give another"):
            report.check_place(tmp_path / name)
    report.append(tmp_path / "ours.csv", [{"date": "d", "device": "cpu", "commit": "c", "command": "x", "system": "megakd"}])
    report.check_place(tmp_path / "ours")
    report.check_place(ROOT / "benchmarks" / "results" / "iteration_cpu")
    with pytest.raises(UserError, match=r"--out \S+/mine.csv is a file, and \S+ cannot lie under it"):
        report.check_place(tmp_path / "mine.csv" / "deep" / "x")


def test_force_replaces_an_export_and_no_other_model(lab, tmp_path):
    hf_to_native(lab / "student", tmp_path / "native", tp=1, pp=1)
    mine = Path(shutil.copytree(lab / "teacher", tmp_path / "mine"))
    before = contents(mine)
    with pytest.raises(UserError, match=r"--save \S+/mine: holds something else than an export of megakd, which --force does not replace"):
        export_to_hf(tmp_path / "native", mine)
    assert contents(mine) == before
    export_to_hf(tmp_path / "native", tmp_path / "out")
    export_to_hf(tmp_path / "native", tmp_path / "out")


# ---- evaluations


def test_a_second_evaluation_needs_to_be_told_to_overwrite_and_until_its_end_the_first_one_stands(lab, tmp_path, monkeypatch):
    save = tmp_path / "evaluation"
    first = evaluation(lab, save, teacher_model=str(lab / "teacher"), exposure_bias=True)
    run(evaluate, first)
    assert json.loads((save / MARKER).read_text())["made_by"] == "evaluate.py"
    before = contents(save)
    with pytest.raises(UserError, match=r"--save \S+ holds the results of an evaluation; give another folder, or --overwrite to replace them"):
        check_folder(first)
    second = evaluation(lab, save, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr("megakd.evaluation.evaluator.held_out_losses", full)  # after the answers were written
        with pytest.raises(AssertionError, match="No space left"):
            run(evaluate, second)
    assert before.items() <= contents(save).items()
    run(evaluate, second)
    assert {*before} - {*contents(save)} == {"exposure_bias.jsonl", "figures/exposure_bias.png", "figures/exposure_bias.csv"}
    assert not [name for name in contents(save) if name.startswith(".")]


def test_an_evaluation_that_was_cut_off_begins_again(lab, tmp_path):
    save = tmp_path / "evaluation"
    OwnFolder(save, "evaluate.py").claim()
    (save / ".answers.jsonl.partial").write_text("half")
    check_folder(evaluation(lab, save))


def test_the_evaluation_of_a_version_without_markers_may_be_overwritten(lab, tmp_path):
    report = {"config": {"model": "m", "dtype": "auto"}, "versions": {}, "sets": {}}
    (tmp_path / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    with pytest.raises(UserError, match="--overwrite to replace"):
        check_folder(evaluation(lab, tmp_path))
    check_folder(evaluation(lab, tmp_path, overwrite=True))


def test_results_are_json_whatever_the_numbers_are():
    assert dump({"a": [float("nan"), {"b": float("inf")}], "c": 1.5}) == '{"a": [null, {"b": null}], "c": 1.5}\n'


# ---- answer files


def test_an_answer_file_is_continued_with_the_data_and_the_model_that_began_it_wherever_they_lie_now(lab, tmp_path, capsys):
    model, data = Path(shutil.copytree(lab / "student", tmp_path / "model")), Path(shutil.copy(lab / "valid.jsonl", tmp_path / "data.jsonl"))
    config = generation(lab, tmp_path / "answers.jsonl", model=str(model), data=str(data))
    run(write_responses, config)
    whole = (tmp_path / "answers.jsonl").read_bytes()
    model.rename(tmp_path / "moved")
    ResponseFile(replace(config, model=str(tmp_path / "moved")))
    data.write_text(data.read_text().replace("Copy", "Sort", 1) + "\n")
    with pytest.raises(UserError, match=r"--data \S+data.jsonl: its content is not what --save \S+answers.jsonl was begun with; give it as"):
        ResponseFile(replace(config, model=str(tmp_path / "moved")))
    shutil.copy(lab / "valid.jsonl", data)
    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, tmp_path / "moved" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"--model \S+moved: its content is not what --save \S+ was begun with"):
        ResponseFile(replace(config, model=str(tmp_path / "moved")))
    assert (tmp_path / "answers.jsonl").read_bytes() == whole
    (tmp_path / "answers.jsonl.megakd.json").unlink()  # as a version without checksums left it
    ResponseFile(replace(config, model=str(model)))
    assert "answers.jsonl was begun by a version without checksums" in capsys.readouterr().err


def test_special_tokens_that_the_text_of_a_response_lacks_are_told(lab, tmp_path, monkeypatch, capfd):
    """A tool call's sign, for example; here every token counts as one."""
    monkeypatch.setattr("megakd.generation.write_responses.hidden_ids", lambda tokenizer: frozenset(range(len(tokenizer))))
    for token_ids in (True, False):
        config = replace(generation(lab, tmp_path / f"{token_ids}.jsonl"), token_ids=token_ids)
        run(write_responses, config)
    told = [line for line in capfd.readouterr().err.splitlines() if "special" in line]
    assert len(told) == 1 and re.fullmatch(
        rf"note: {tmp_path}/False.jsonl: \d+ responses hold special tokens that their text lacks, and so would training; --token-ids keeps them",
        told[0],
    )


def test_one_changed_weight_in_a_large_file_is_beyond_a_sample_but_a_changed_tensor_is_not(tmp_path):
    block = fingerprint.PIECE_BYTES
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(100 * block))
    sums = {fingerprint.checksum(fingerprint.model_files(tmp_path), whole=False)}
    for start in range(0, 100 * block - 3 * block, 7 * block):  # three blocks in a row, wherever they are
        changed = bytearray(100 * block)
        changed[start : start + 3 * block] = b"\1" * (3 * block)
        weights.write_bytes(changed)
        sums.add(fingerprint.checksum(fingerprint.model_files(tmp_path), whole=False))
    assert len(sums) == 1 + len(range(0, 97 * block, 7 * block))
    (tmp_path / "README.md").touch()
    assert fingerprint.checksum(fingerprint.model_files(tmp_path), whole=False) in sums


def test_the_checksum_of_a_checkpoint_is_that_of_its_latest_iteration(lab, tmp_path):
    hf_to_native(lab / "student", tmp_path / "native", tp=1, pp=1)
    files = fingerprint.model_files(tmp_path / "native")
    assert files == fingerprint.model_files(tmp_path / "native" / "iter_0000000") and any(file.suffix == ".distcp" for file in files)


# ---- runs


def test_a_run_without_a_checkpoint_begins_anew_with_other_settings(lab, tmp_path):
    save = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"is nan|is inf"):
        run(trainer.train, run_config(lab, save, lr="1e30", **{"train-iters": 4}))
    logged = read_jsonl(save / "metrics.jsonl")
    (save / "rollouts.jsonl").touch()
    assert json.loads((save / MARKER).read_text())["made_by"] == "pretrain_kd.py" and logged
    run(trainer.train, run_config(lab, save))
    assert [row["iteration"] for row in read_jsonl(save / "metrics.jsonl")] == [1, 2]
    assert yaml.safe_load((save / "config.yaml").read_text())["lr"] == 1e-3 and not (save / "rollouts.jsonl").exists()
    assert (save / "hf" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def finished_run(lab) -> Path:
    """A run of two iterations with a checkpoint after each."""
    run(trainer.train, run_config(lab, lab / "finished", **{"save-interval": 1}))
    return lab / "finished"


@pytest.fixture
def finished(finished_run, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def again(lab: Path, save: Path, **flags) -> Config:
    return run_config(lab, save, **{"save-interval": 1} | flags)


def test_a_finished_run_given_once_more_leaves_its_student_as_it_is(lab, finished):
    save = finished
    (save / "hf" / "README.md").write_text("my model card")
    (save / MARKER).unlink()  # as a version without markers left it
    before = contents(save / "hf")
    run(trainer.train, again(lab, save))
    assert contents(save / "hf") == before and (save / MARKER).is_file()
    with pytest.raises(UserError, match=r"--lr 0.5 differs from the 0.001 of the run in --save"):
        preflight.check_run_folder(again(lab, save, lr=0.5))
    with pytest.raises(UserError, match=r"--use-distributed-optimizer True differs from the False"):  # Adam's state lies otherwise in it
        preflight.check_run_folder(again(lab, save, **{"use-distributed-optimizer": True}))


def test_what_a_run_without_checkpoints_would_lose_is_not_lost(lab, finished):
    save = finished
    latest = save / "checkpoints" / native.LATEST
    latest.unlink()
    with pytest.raises(UserError, match=rf"--save \S+ holds iter_0000002, but no checkpoints/{native.LATEST}; write the number of the iter"):
        preflight.check_run_folder(again(lab, save))
    shutil.rmtree(save / "checkpoints")
    with pytest.raises(UserError, match=r"--save \S+ holds the student of a finished run in hf/, but no checkpoint to continue from; give"):
        preflight.check_run_folder(again(lab, save))
    (save / "hf" / "megakd_export.json").unlink()
    with pytest.raises(UserError, match=r"--save \S+: what its hf/ holds is no export of a run; move it away, or give another --save"):
        preflight.check_run_folder(again(lab, save))


def test_the_way_back_from_a_lost_checkpoint_is_a_way(lab, finished):
    save = finished
    unbroken, checkpoints = (save / "hf" / "model.safetensors").read_bytes(), save / "checkpoints"
    shutil.rmtree(save / "hf")
    (checkpoints / "iter_0000002" / "__0_0.distcp").unlink()
    way = r"; the newest other iteration that can be opened is 1; --resume 1 continues from it$"
    with pytest.raises(UserError, match=rf"__0_0.distcp: checksums.sha256 lists it, but it is not there.*{way}"):
        preflight.check_run_folder(again(lab, save))
    with pytest.raises(UserError, match=rf"can be opened is 1; give --model {checkpoints}/iter_0000001$"):
        native.NativeCheckpoint(checkpoints, flag="--model")
    with pytest.raises(UserError, match=r"can be opened is 1; choose it with --iteration 1$"):
        native.NativeCheckpoint(checkpoints)
    shutil.rmtree(checkpoints / "iter_0000002")
    with pytest.raises(UserError, match=rf"holds no iter_0000002 \(there: iter_0000001\){way}"):
        preflight.check_run_folder(again(lab, save))
    for text, message in {"soon": rf"says 'soon', which is no iteration{way}", "release": r"is Megatron-LM's own 'release' format"}.items():
        (checkpoints / native.LATEST).write_text(text)
        with pytest.raises(UserError, match=message):
            preflight.check_run_folder(again(lab, save))
    (checkpoints / native.LATEST).write_text("1\n")
    run(trainer.train, again(lab, save))
    assert (save / "hf" / "model.safetensors").read_bytes() == unbroken
    for number in (1, 2):
        (checkpoints / f"iter_000000{number}" / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"not there.*; no other iteration there is whole; give another --save$"):
        preflight.check_run_folder(again(lab, save))


def test_what_a_crash_left_damaged_at_the_end_of_a_file_is_cut_and_told(lab, tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    file.write_text(dump({"iteration": 1, "x": 1}) + dump({"iteration": 2, "x": 2}) + "\0" * 40 + "\n" + '{"iter\n\xff\n')
    assert [row["iteration"] for row in read_jsonl(file)] == [1, 2]
    lines = JsonLines(file, resumed_iteration=2)
    lines.append(3, {"x": 3})
    lines.close()
    assert [row["iteration"] for row in read_jsonl(file)] == [1, 2, 3]
    assert capsys.readouterr().err == f"note: {file}: damaged at its end, as by a crash; 3 line(s) after iteration 2 are cut off\n"
    file.write_text(dump({"iteration": 1}) + "\0\n" + dump({"iteration": 2}))
    with pytest.raises(UserError, match=r"metrics.jsonl line 2 is damaged, and whole lines follow it; remove that line"):
        JsonLines(file, resumed_iteration=2)


def test_a_file_of_an_earlier_version_is_read_and_continued_under_todays_names(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 1, "valid/lm": 2.5, "loss/lm": 3.0}\n')
    expected = [{"iteration": 1, "valid/lm_loss": 2.5, "loss/lm": 3.0}]
    assert read_jsonl(file) == expected
    JsonLines(file, resumed_iteration=1).close()
    assert list(map(json.loads, file.read_text().splitlines())) == expected


def test_distillm_becomes_on_policy_by_default_when_the_held_out_loss_rises(lab, tmp_path):
    flags = {"method": "distillm", "teacher-model": lab / "teacher", "valid-data": lab / "valid.jsonl", "lr": 10, "train-iters": 20}
    run(trainer.train, run_config(lab, tmp_path / "run", **flags, **{"lr-decay-style": "constant"}))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    held_out = {row["iteration"]: row["valid/lm_loss"] for row in rows if "valid/lm_loss" in row}
    assert list(held_out) == list(range(0, 21, 2))  # 2.5 batches an epoch, and a tenth of the run is 2 iterations
    assert max(held_out.values()) > held_out[0] + 0.1
    assert [row["on_policy_share"] for row in rows if "on_policy_share" in row][-1] > 0


def test_what_a_run_may_not_be_meant_to_do_is_told_once(lab, tmp_path, capfd):
    run(trainer.train, run_config(lab, tmp_path / "run", **{"lr-warmup-iters": 100, "global-batch-size": 12}))
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ")]
    assert said == [
        f"note: {lab}/train.jsonl: left out 20 of 40 rows, prompt longer than 10 tokens",
        "note: --lr-warmup-iters 100 is more than the run's 2 iterations: its learning rate ends at 2.0e-05",
        "note: --global-batch-size 12 does not divide the 20 rows of the data: 8 of them, others each time, are left out of an epoch",
        "note: responses end with '<|endoftext|>' (0)",
    ]


# ---- Ctrl-C


def test_an_interrupted_command_saves_and_says_how_to_go_on(lab, tmp_path):
    flags = training(lab, tmp_path / "run", **{"train-iters": 100000})
    words = [sys.executable, str(ROOT / "scripts" / "pretrain_kd.py"), *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("iteration")
        process.send_signal(signal.SIGINT)
        said, notes = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in notes
    saved = read_latest(tmp_path / "run" / "checkpoints")
    assert said.splitlines()[-1] == f"SIGINT: ended after iteration {saved}/100000, which is saved; the same command continues {tmp_path}/run"
