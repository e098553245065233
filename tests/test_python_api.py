"""megakd from Python: the page's code runs, alone and under torchrun, and a call does what the script does."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed import CONTEXT, run_distributed
from test_trainer import command, inputs, numbers, run  # noqa: F401, `inputs` is a fixture
from tiny import tiny_folder
from train_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import megakd
from megakd.errors import UserError
from megakd.runtime.initialize import ALONE

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text()
FLAGS = {"max_length": 16, "max_prompt_length": 10, "train_iters": 4, "global_batch_size": 8, "lr": 1e-3, "save_interval": 2, "eval_interval": 2}


def alone(test):
    """The test in a process of its own: one that has trained cannot be forked into ranks any more."""

    def outcome(results, fixtures: dict) -> None:
        try:
            results.put(test(**fixtures))
        except BaseException:
            results.put(traceback.format_exc())

    @functools.wraps(test)
    def forked(**fixtures):
        results = CONTEXT.SimpleQueue()
        process = CONTEXT.Process(target=outcome, args=(results, fixtures))
        process.start()
        answered = results._reader.poll(180)
        error = results.get() if answered else "no answer"
        process.join(5)
        process.kill()
        assert error is None, error

    return forked


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}


def launcher_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in (*ALONE, "MASTER_PORT")}


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """A folder with the models that the page names, and its code as one program."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = train_tokenizer([f"{a}+{b}={a + b}" for a in range(10) for b in range(10)])
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(folder / "models" / name, "gpt2", layers=2, vocab_size=len(tokenizer), seed=seed)
        tokenizer.save_pretrained(folder / "models" / name)
    (folder / "page.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)))
    return folder


def run_page(folder: Path, python: str, *launcher: str) -> str:
    done = subprocess.run([python, *launcher, "page.py"], cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_pages_code_runs_alone_and_then_under_torchrun_where_it_continues(page, python):
    said = run_page(page, python)
    assert "runs/promptkd/hf" in said and "--max-length 100000 is more than the 64 positions of --model runs/promptkd/hf" in said
    before = (page / "runs" / "promptkd" / "metrics.jsonl").read_bytes()
    (page / "page.py").write_text((page / "page.py").read_text().replace('"runs/sft"', '"runs/sft-2"'))
    run_page(page, python, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    assert (page / "runs" / "promptkd" / "metrics.jsonl").read_bytes() == before  # a finished run is not run again
    first, second = (numbers(page / "runs" / name) for name in ("sft", "sft-2"))
    for ours, theirs in zip(second, first, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def by_script(inputs) -> Path:  # noqa: F811
    run_distributed(run, 1, command(inputs, "by-script", "kd"))
    return inputs / "by-script"


@alone
def test_objects_give_the_numbers_of_the_script(inputs, by_script):  # noqa: F811
    models = {name: AutoModelForCausalLM.from_pretrained(inputs / name) for name in ("student", "teacher")}
    before = {name: tensor.clone() for name, tensor in models["student"].state_dict().items()}
    data = {f"{name}_data": (row for row in rows_of(inputs / f"{name}.jsonl")) for name in ("train", "valid")}
    variables, told = launcher_variables(), {"iteration": [], "evaluation": []}
    result = megakd.distill(
        **models,
        **data,
        method="kd",
        save=inputs / "by-call",
        on_iteration=lambda *what: told["iteration"].append(what),
        on_evaluation=lambda *what: told["evaluation"].append(what),
        **FLAGS,
    )
    assert numbers(inputs / "by-call") == numbers(by_script) and not dist.is_initialized() and launcher_variables() == variables
    assert all(tensor.equal(before[name]) for name, tensor in models["student"].state_dict().items())
    assert [i for i, _ in told["iteration"]] == [1, 2, 3, 4] and [i for i, _ in told["evaluation"]] == [0, 2, 4]
    assert [{"iteration": i, **metrics} for i, metrics in told["iteration"]] == [row for row in result.log if "valid/lm_loss" not in row]
    assert result.metrics["valid/lm_loss"] == told["evaluation"][-1][1]["valid/lm_loss"] and result.metrics["iteration"] == 4
    ours, theirs = result.load().state_dict(), AutoModelForCausalLM.from_pretrained(by_script / "hf").state_dict()
    assert ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@alone
def test_a_call_cut_off_is_continued_with_the_same_objects_and_no_others(inputs):  # noqa: F811
    class CutOffError(Exception):
        pass

    def cut_off(iteration, metrics):
        if iteration == 3:
            raise CutOffError

    student, teacher = (AutoModelForCausalLM.from_pretrained(inputs / name) for name in ("student", "teacher"))
    rows = rows_of(inputs / "train.jsonl")
    call = lambda save, student=student, rows=rows, **more: megakd.distill(
        student=student, teacher=teacher, train_data=rows, valid_data=inputs / "valid.jsonl", method="promptkd", save=save, **FLAGS, **more
    )
    call(inputs / "unbroken-call")
    with pytest.raises(CutOffError):
        call(inputs / "broken-call", on_iteration=cut_off)
    for name, other in {"student": {"student": teacher}, "train_data": {"rows": rows[::-1]}}.items():
        with pytest.raises(UserError, match=rf"^{name} is not what the run in --save \S+ was begun with; give the same to continue it"):
            call(inputs / "broken-call", **other)
    call(inputs / "broken-call")
    assert numbers(inputs / "broken-call") == numbers(inputs / "unbroken-call")


def refused(tmp_path: Path, error: type[Exception], message: str, **changes) -> None:
    given = {"student": tmp_path, "train_data": [{"prompt": "a", "response": "b"}], "method": "sft", "save": tmp_path / "run", "epochs": 1}
    with pytest.raises(error, match=message):
        megakd.distill(**given | changes)
    assert not (tmp_path / "run" / "inputs").exists() and not dist.is_initialized()


@alone
def test_mistakes_are_exceptions_and_leave_no_inputs(tmp_path, inputs):  # noqa: F811
    refused(tmp_path, TypeError, r"distill\(\) got an unexpected keyword argument 'max_lenght'; did you mean max_length\?", max_lenght=3)
    refused(tmp_path, TypeError, r"distill\(\) got an unexpected keyword argument 'model'; did you mean student\?", model="x")
    refused(tmp_path, TypeError, "student is a int; give a path or a transformers model", student=3)
    refused(tmp_path, TypeError, "train_data is a int; give a path or rows", train_data=3)
    refused(tmp_path, TypeError, "tokenizer is of a model that is given as an object; a folder has its own", tokenizer="x")
    refused(tmp_path, UserError, r"^distill\(\): .*--lr", lr="fast")
    refused(tmp_path, UserError, "--lr -1.0 must be above 0", lr=-1.0)
    refused(tmp_path, UserError, "--method kd needs --teacher-model", method="kd")
    refused(tmp_path, UserError, "^train_data row 1 is a str; give mappings of fields: a list of dicts, or one split", train_data={"train": []})
    refused(tmp_path, UserError, "^train_data row 2 holds what JSON cannot say", train_data=[{"prompt": "a"}, {"prompt": b"a"}])
    model = AutoModelForCausalLM.from_pretrained(inputs / "student")
    model.name_or_path = ""
    refused(tmp_path, UserError, "student is a model that was loaded from no folder; give its tokenizer as tokenizer=", student=model)


def test_every_rank_hears_of_a_mistake_in_objects_and_objects_are_read_at_another_layout(inputs):  # noqa: F811
    student = AutoModelForCausalLM.from_pretrained(inputs / "student")
    rows = rows_of(inputs / "train.jsonl")
    flags = FLAGS | {"method": "sft", "eval_interval": None, "hidden_dropout": 0.0}

    def call(layout):
        with pytest.raises(UserError, match=r"^train_data row 33 is a str"):
            megakd.distill(student=student, train_data=[*rows, "a row"], save=inputs / "no-call", **flags)
        calls = [
            megakd.distill(student=student, train_data=rows, save=inputs / f"tp{tp}-call", tensor_model_parallel_size=tp, **flags) for tp in (2, 1)
        ]
        return [result.metrics["loss/lm"] for result in calls], dist.is_initialized()

    for losses, still_joined in run_distributed(call, 2):
        assert losses[0] == pytest.approx(losses[1], rel=1e-5) and still_joined


def test_a_teachers_own_rank_hears_of_a_row_that_cannot_be_used_and_the_next_call_finds_all(inputs):  # noqa: F811
    flags = FLAGS | {"method": "kd", "teacher": inputs / "teacher", "teacher_ranks": 1, "eval_interval": None, "hidden_dropout": 0.0}
    bad = inputs / "bad.jsonl"
    bad.write_text((inputs / "train.jsonl").read_text() + '{"prompt": "x", "response": 7}\n')

    def call(layout):
        with pytest.raises(UserError, match=r"bad.jsonl line 33"):
            megakd.distill(student=inputs / "student", train_data=bad, save=inputs / "bad-call", **flags)
        return megakd.distill(student=inputs / "student", train_data=inputs / "train.jsonl", save=inputs / "good-call", **flags).metrics

    mine, theirs = run_distributed(call, 2)
    assert mine["loss/total"] == theirs["loss/total"]


@alone
def test_every_rank_hears_of_a_folder_that_cannot_be_written(inputs):  # noqa: F811
    """Rank 0 alone tries; a rank that went on would wait for it until the timeout."""
    student, rows = str(inputs / "student"), str(inputs / "train.jsonl")
    lengths = {"max_length": 32, "max_prompt_length": 16, "train_iters": 1, "micro_batch_size": 1, "global_batch_size": 2}

    def call(layout):
        os.environ["RANK"] = str(dist.get_rank())
        for function, flags in (
            (megakd.distill, {"student": student, "train_data": rows, "method": "sft", "save": "/proc/nowhere/run", **lengths}),
            (megakd.evaluate, {"model": student, "data": [rows], "save": "/proc/nowhere/scores"}),
            (megakd.generate, {"model": student, "data": rows, "save": "/proc/nowhere/answers.jsonl"}),
        ):
            with pytest.raises(UserError, match=r"--save /proc/nowhere\S*: No such file or directory"):
                function(**flags)

    run_distributed(call, 2)


@alone
def test_a_tokenizer_that_is_given_is_the_students(inputs, tmp_path):  # noqa: F811
    model = AutoModelForCausalLM.from_pretrained(inputs / "student")
    model.name_or_path = ""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "teacher")
    flags = FLAGS | {"train_iters": 1, "eval_interval": None}
    data = inputs / "train.jsonl"
    result = megakd.distill(student=model, tokenizer=tokenizer, train_data=data, method="sft", save=tmp_path / "run", **flags)
    assert AutoTokenizer.from_pretrained(result.student).get_vocab() == tokenizer.get_vocab()


def test_importing_megakd_imports_no_torch():
    told = "import sys, megakd; print('torch' in sys.modules, 'transformers' in sys.modules); megakd.distill; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], env=environment(), capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False", "True"], done.stderr
