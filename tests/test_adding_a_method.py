"""docs/adding_a_method.md: its two files and two lines are a method that is helped with, checked and trained as any other."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open
from tasks import make_rows
from tiny import tiny_folder
from train_tokenizer import train_tokenizer

from megakd.reporting.jsonl import read_jsonl

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding_a_method.md").read_text()
TRAIN = "megakd/config/train.py"
ANCHORS = {"from": "from megakd.config.methods.minillm import MiniLLMConfig\n", "    ": "    minillm: Group[MiniLLMConfig] = MiniLLMConfig()\n"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the tree with what the page adds, two models and a little data."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "megakd", root / "megakd", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "scripts").symlink_to(ROOT / "scripts")
    files = dict(re.findall(r"^`(megakd/\S+\.py)`\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
    assert set(files) == {"megakd/config/methods/mapkd.py", "megakd/methods/mapkd.py"}
    for name, text in files.items():
        (root / name).write_text(text)
    add_lines(root / TRAIN)
    rows = make_rows(16, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(root / name, "gpt2", layers=2, vocab_size=len(tokenizer), seed=seed)
        tokenizer.save_pretrained(root / name)
    (root / "train.jsonl").write_text("".join(json.dumps({"prompt": r["prompt"], "response": r["response"]}) + "\n" for r in rows))
    return root


def add_lines(path: Path) -> None:
    """The page's diff: each line behind one of its kind."""
    (diff,) = re.findall(rf"^`{TRAIN}`\n\n```diff\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    lines, text = [line[1:] + "\n" for line in diff.splitlines()], path.read_text()
    assert len(lines) == 2
    for line in lines:
        anchor = ANCHORS[line[:4]]
        assert text.count(anchor) == 1
        text = text.replace(anchor, anchor + line)
    path.write_text(text)


def command(checkout: Path, python: str, *words: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{checkout}:{ROOT / 'kernels'}"}
    arguments = [python, "scripts/pretrain_kd.py", *map(str, words)]
    return subprocess.run(arguments, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)


FLAGS = ["--model", "student", "--teacher-model", "teacher", "--train-data", "train.jsonl", "--max-length", 24, "--max-prompt-length", 18,
         "--micro-batch-size", 4, "--global-batch-size", 8, "--lr", "1e-2", "--save", "run"]  # fmt: skip


def test_its_flag_and_its_help_are_there(checkout, python):
    said = command(checkout, python, "--help").stdout
    assert "--map-scale FLOAT" in said and "reverse KL through a trained map" in re.sub(r"[│\s]+", " ", said)


@pytest.mark.parametrize(
    "words, line",
    [
        (["--method", "kd", "--map-scale", 2, "--train-iters", 1], "--method kd has no use for --map-scale 2.0, a flag of mapkd; leave it out"),
        (["--method", "mapkd", "--map-scale", 0, "--train-iters", 1], "--map-scale 0.0 must be above 0"),
        (["--method", "mapkd", "--top-k", 3, "--train-iters", 1], "--method mapkd has no use for --top-k 3, a flag of kd, seqkd, distillm, minillm, promptkd; leave it out"),
        (["--method", "mapkd", "--epochs", 1], "--epochs 1: the map of --method mapkd learns too little in one; give 2 or more"),
    ],
)
def test_its_mistakes_are_told(checkout, python, words, line):
    assert command(checkout, python, *FLAGS, *words).stderr == f"error: {line}\n"


def test_it_trains_and_its_student_is_exported(checkout, python):
    done = command(checkout, python, *FLAGS, "--method", "mapkd", "--train-iters", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (row["loss/reverse_kl"] for row in read_jsonl(checkout / "run" / "metrics.jsonl"))
    assert second < first
    with safe_open(checkout / "run" / "hf" / "model.safetensors", "pt") as student, safe_open(checkout / "student" / "model.safetensors", "pt") as before:
        assert set(student.keys()) == set(before.keys()), "the map is no part of the export"


def test_a_divergence_of_the_users_own_is_one_file_and_no_line(checkout, python):
    (text,) = re.findall(r"^`squared\.py`\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    (checkout / "squared.py").write_text(text)
    kd = [*FLAGS[:-2], "--method", "kd", "--train-iters", 2, "--kd-ratio", 1]

    def logged(save: str, *words: object) -> list[float]:
        run = command(checkout, python, *kd, "--kd-objective", *words, "--save", save)
        assert run.returncode == 0, run.stderr
        return [row["loss/total"] for row in read_jsonl(checkout / save / "metrics.jsonl")]

    named = logged("named", "alpha_beta", "--skew-alpha", 1, "--beta", 1)
    assert logged("own", "squared.py:squared") == pytest.approx(named, rel=1e-5), "alpha = beta = 1 is half the squared distance"
    (checkout / "named.py").write_text("def total(log_q, log_p, total):\n    return total(log_q)\n\n\nthing = object()\n")
    wrong = {"named.py:total": "loss/total is logged beside it", "named.py:thing": "has no function thing", "named.py:a:b": "is unknown; use one of"}
    wrong |= {"squared.py:cubed": "has no function cubed; write one", "absent.py:f": "No such file", "kl": "is unknown; use one of forward_kl"}
    for objective, says in wrong.items():
        run = command(checkout, python, *kd, "--kd-objective", objective, "--save", "refused")
        assert run.returncode and says in run.stderr and "Traceback" not in run.stderr, run.stderr
        assert not (checkout / "refused").exists()
