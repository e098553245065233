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
from safetensors.torch import load_file, save_file
from tiny import tiny_folder

from megakd import preflight, trainer
from megakd.benchmarking import results as benchmark_results
from megakd.checkpointing import native
from megakd.checkpointing.export_hf import export_to_hf
from megakd.checkpointing.import_hf import hf_to_native
from megakd.checkpointing.publish import published
from megakd.config import Config, EvaluateConfig, GenerateConfig, ResponseConfig, parse
from megakd.data.tasks import make_rows
from megakd.data.train_tokenizer import train_tokenizer
from megakd.errors import UserError
from megakd.evaluation import models, origin
from megakd.evaluation.evaluator import evaluate
from megakd.evaluation.report import check_folder
from megakd.evaluation.write_responses import ResponseFile, write_responses
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
    for module in (trainer, models):
        monkeypatch.setattr(module, "build_model", lambda *_, **__: pytest.fail("a model was built"))
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
    monkeypatch.setattr("megakd.models.hf_writer.memoryview", full, raising=False)
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


def test_two_commands_that_write_one_folder_are_told(tmp_path):
    with pytest.raises(UserError, match=r"\S+/out: another command writes it too, and took away what was half-written; run one at a time"):
        with published(tmp_path / "out") as folder:
            shutil.rmtree(folder)  # as another command does that begins the same
            (folder / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError), published(tmp_path / "out"):  # a source that is not there is another matter
        (tmp_path / "source").read_text()
    assert not list(tmp_path.iterdir())
