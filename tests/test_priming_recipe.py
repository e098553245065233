"""Response priming in one command: its questions are right, the teacher's texts are training's, its commands can run, its stages go once."""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipes import ROOT, paper, recipe, run_with_fake_python

from megakd.config import AttentionConfig, Config, EvaluateConfig, from_yaml, parse
from megakd.data.priming import NAMED, open_priming
from megakd.evaluation import gsm8k

sys.path.insert(0, str(ROOT / "scripts" / "recipes"))
WORDS, PREPARE, REPORT = recipe("word_problems"), recipe("prepare_priming"), recipe("report_priming")
CONFIGS = ROOT / "configs" / "response-priming"
SCALES = ("tiny", "real", "real-cpu", "llama-3.1-8b")
STUDENTS = ("sft", "kd-none", "kd-confidence", "kd-teacher", "kd-ground-truth", "kd-hint", "kd-original")


# ---- word problems


def test_word_problems_are_right_and_none_comes_twice():
    found = WORDS.problems(2000, seed=3)
    assert len({one.question for one in found}) == 2000 and found == WORDS.problems(2000, seed=3) != WORDS.problems(2000, seed=4)
    for one in found:
        numbers = [int(number) for number in gsm8k.numbers(one.question)]
        start, *changes = numbers[-len(one.steps) - 1 :]  # an aside with somebody else's number may stand in front
        told = [words.split("then ")[-1].split()[1] in WORDS.GAINS for words in one.question.split(". ")[-2].split(", ")]
        for (have, sign, change, left), told_change, gained in zip(one.steps, changes, told, strict=True):
            assert (have, change, left) == (start, told_change, start + (change if gained else -change)), one
            assert (sign == "+") == gained and 0 <= left <= WORDS.LARGEST
            start = left
        assert one.number == start and 2 <= len(one.steps) <= 4


def test_an_answer_is_in_gsm8ks_form_and_every_rule_finds_its_number():
    for one in WORDS.problems(200, seed=5):
        for text in NAMED:
            said = PREPARE.answer(one, text, random.Random(0))
            assert said.endswith(f"\nThe answer is {one.number}.\n#### {one.number}") or said == one.answer()
            assert gsm8k.extract(said, gsm8k.STRICT) == gsm8k.extract(said, gsm8k.ROBUST) == gsm8k.gold_number(said) == one.number
        assert eval(one.check.removeprefix("Check: ").replace("=", "=="))


# ---- the data stage


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory) -> Path:
    """The tiny scale's files, fewer rows."""
    folder = tmp_path_factory.mktemp("tiny")
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
    rows = {"train_rows": 20, "valid_rows": 5, "test_rows": 10, "student_rows": 400, "teacher_rows": 1000}
    PREPARE.make_word_problems(folder, {"vocab_size": 400, "positions": 64, "teacher": sizes, "student": sizes, **rows}, folder)
    return folder


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_no_question_is_both_learnt_and_asked(tiny_data):
    parts = [{row["question"] for row in rows_of(tiny_data, name)} for name in ("train", "valid", "test", "student")]
    assert [len(part) for part in parts] == [20, 5, 10, 400] and len(set.union(*parts)) == 435
    assert not any(one in row["question"] for row in rows_of(tiny_data, "teacher") for one in parts[2])


def test_the_teacher_learns_to_answer_each_text_in_its_way(tiny_data):
    taught = rows_of(tiny_data, "teacher")
    by_text = {
        name: [row for row in taught if row["question"].startswith(before) and row["question"].endswith(after)]
        for name, (before, after) in NAMED.items() if name != "none"
    }  # fmt: skip
    assert all(150 < len(rows) < 250 for rows in by_text.values())
    for name, rows in by_text.items():
        assert all(" = " in row["answer"] and ("Check: " in row["answer"]) == (name == "confidence") for row in rows)
    told = [row for row in taught if row["question"].startswith("The right answer is ")]
    assert 150 < len(told) < 250 and all(row["question"].split(".")[0].split()[-1] == row["answer"].split()[-1] for row in told)
    plain = [row for row in taught if row not in told and not any(row in rows for rows in by_text.values())]
    short = sum(" = " not in row["answer"] for row in plain) / len(plain)
    assert 0.82 < short < 0.98
    assert 0.82 < sum(" = " not in row["answer"] for row in rows_of(tiny_data, "student")) / 400 < 0.98


def test_the_teacher_is_asked_in_evaluation_as_it_is_in_training(tiny_data):
    asked = rows_of(tiny_data, "test")
    for name in NAMED:
        questions = [row["question"] for row in rows_of(tiny_data, f"test_{name}")]
        assert questions == [open_priming(name)(row["question"], "", row) for row in asked]


@pytest.mark.parametrize("chat", [False, True])
def test_gsm8ks_first_questions_are_taken(data_folder, tmp_path, chat):
    data = data_folder / "gsm8k"
    if not data.is_dir():
        pytest.skip(f"no {data}")
    PREPARE.take_gsm8k(tmp_path, {"train_rows": 6, "valid_rows": 2, "test_rows": 3, "chat": chat}, data)
    source = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()[:8]]
    found = [*rows_of(tmp_path, "train"), *rows_of(tmp_path, "valid")]
    pairs = [[turn["content"] for turn in row["messages"]] if chat else [row["question"], row["answer"]] for row in found]
    assert pairs == [[row["question"], row["answer"]] for row in source] and len(rows_of(tmp_path, "test")) == 3
    assert [row["hint"] for row in found][:2] == ["The right answer is 72.", "The right answer is 10."]
    primed = rows_of(tmp_path, "test_confidence")[0]
    assert (primed["messages"][0]["content"] if chat else primed["question"]).endswith(NAMED["confidence"][1])


def test_missing_data_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/recipes/prepare_priming.py"), "--configs", str(CONFIGS / "real"), "--data", str(tmp_path)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "DATA names the folder of GSM8K's train.jsonl" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- stages


@pytest.fixture(scope="module", params=SCALES)
def planned(request, tmp_path_factory) -> dict[str, list[str]]:
    """The words of each stage's command, as --dry-run prints them."""
    out = tmp_path_factory.mktemp("out") / "run"
    done = subprocess.run(paper(request.param, out, "--dry-run", recipe="priming.sh"), capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and not out.exists()
    lines = done.stdout.splitlines()
    return {name.removeprefix("== "): shlex.split(command) for name, command in zip(lines[::2], lines[1::2], strict=True)}


def test_every_command_of_every_scale_can_be_given(planned):
    kinds = {"pretrain_kd.py": Config, "evaluate.py": EvaluateConfig, "analyze_attention.py": AttentionConfig}
    seen = {name: 0 for name in kinds}
    for command in planned.values():
        at, script = next((i, Path(word).name) for i, word in enumerate(command) if word.endswith(".py"))
        if script in kinds:
            parse(command[at + 1 :], kinds[script], program=script)  # exits where a flag or a combination cannot be
            seen[script] += 1
    assert seen["evaluate.py"] == 12 and seen["analyze_attention.py"] == 1 and seen["pretrain_kd.py"] in (7, 9)


def test_each_run_differs_from_the_others_in_what_its_teacher_reads(planned):
    flags = {}
    for name in STUDENTS:
        at = next(i for i, word in enumerate(planned[name]) if word.endswith("pretrain_kd.py"))
        flags[name] = parse(planned[name][at + 1 :], Config).flat()
    differing = {"kd-none": set(), "kd-hint": {"teacher_prompt_field"}, "kd-original": {"teacher_priming", "priming_objective"}}
    for name in STUDENTS[1:]:
        found = {key for key, value in flags[name].items() if value != flags["kd-none"][key]} - {"save"}
        assert found == differing.get(name, {"teacher_priming"}) and flags[name]["method"] == "response_priming"
    alike = ("train_iters", "epochs", "global_batch_size", "lr", "lr_decay_style", "seed", "train_data", "model", "max_length")
    assert all(flags["sft"][key] == flags["kd-none"][key] for key in alike)


LAYOUT = {"tensor_model_parallel_size", "sequence_parallel", "recompute", "prompt_template", "eval_interval", "log_interval", "seed"}
LAYOUT |= {"merge_lora", "teacher_priming"}


@pytest.mark.parametrize("text", ["none", "teacher", "ground-truth", "confidence"])
def test_the_papers_scale_has_the_papers_values(text):
    scale = from_yaml(CONFIGS / "llama-3.1-8b" / "response_priming.yaml").flat()
    papers = from_yaml(CONFIGS / f"{text}.yaml").flat()
    assert {name for name, value in papers.items() if value != scale[name]} <= LAYOUT
    assert papers["teacher_priming"] == text and (scale["lr"], scale["lora_rank"]) == (5e-6, 4)


def test_a_failed_stage_is_named_and_the_same_command_continues_with_it(tmp_path):
    done, calls = run_with_fake_python(tmp_path, broken="kd-teacher", recipe="priming.sh")
    assert done.returncode == 1 and done.stdout.splitlines()[-1].startswith("error: stage kd-teacher failed; see ")
    assert len(calls) == 7  # data, teacher, student, sft, none, confidence, and it

    done, calls = run_with_fake_python(tmp_path, recipe="priming.sh")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "the table"
    assert len(calls) == 4 + 12 + 2 and "--teacher-priming teacher" in calls[0]

    done, calls = run_with_fake_python(tmp_path, recipe="priming.sh")
    assert done.returncode == 0 and calls == [] and done.stdout.count("skipped") == 24


def test_an_unknown_scale_and_missing_models_are_told(tmp_path):
    done = subprocess.run(paper("huge", tmp_path, recipe="priming.sh"), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: SCALE huge: configs/response-priming/ has llama-3.1-8b real-cpu real tiny\n"
    environment = {"PATH": "/usr/bin:/bin", "DATA": str(tmp_path)}
    done = subprocess.run(paper("real", tmp_path / "out", recipe="priming.sh"), capture_output=True, text=True, env=environment)
    assert done.returncode and "PRETRAINED_STUDENT: is not set; name the Hugging Face folder of the student" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- the report


def test_the_table_has_every_student_beside_the_papers_and_the_teacher_with_every_text():
    numbers = {"samples": 400, "gsm8k_robust": 50.0, "gsm8k_strict": 25.5, "gsm8k_flexible": 12.25, "response_length": 9.0, "lm_loss": 1.5}
    sets = {name: numbers | {"reverse_kl": 0.25} for name in REPORT.STUDENTS} | dict.fromkeys(REPORT.TEACHERS, numbers)
    made = REPORT.origin(argparse.Namespace(scale="tiny", commit="abc"), {"device": "cpu", "versions": {"torch": "2"}})
    said = REPORT.tables(sets, made).splitlines()
    assert "| KD, ground truth | 50.0 | 25.5 | 12.2 | 9.0 | 1.5000 | 0.2500 | 48.1 |" in said  # 635 of 1,319
    assert "| teacher, confidence | 50.0 | 25.5 | 12.2 | 9.0 | 1.5000 | - |" in said
    assert any("2.5 points at most" in line for line in said) and any("commit abc" in line and "torch 2" in line for line in said)
