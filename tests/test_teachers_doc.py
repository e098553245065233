"""The commands of docs/teachers.md do what it says, with small models where it names those of the quick start."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from test_readme import commands
from tiny import tiny_folder
from train_tokenizer import train_tokenizer

from megakd.reporting.jsonl import read_jsonl

ROOT = Path(__file__).parents[1]
SAID = {"primed": 0, "self": 4, "priming": 4}  # iterations by run folder
COMMANDS = commands((ROOT / "docs" / "teachers.md").read_text())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    for name in ("scripts", "configs"):
        (root / name).symlink_to(ROOT / name)
    rows = [{"prompt": f"{a}+{b}=", "response": f" {a + b}"} for a in range(16) for b in range(8)]
    tokenizer = train_tokenizer([row["prompt"] + row["response"] + " Sort well. " for row in rows])
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(root / "quickstart" / name / "hf", "llama", layers=2, vocab_size=len(tokenizer), seed=seed)
        tokenizer.save_pretrained(root / "quickstart" / name / "hf")
    (root / "quickstart" / "data").mkdir()
    (root / "quickstart" / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize("run", SAID)
def test_a_command_of_the_page_on_teachers_runs(checkout, python, run):
    (command,) = (line for line in COMMANDS if f"runs/{run}" in line.split())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    words = [python, *shlex.split(command)[1:]]
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("the teacher reads") == (2 if run == "primed" else 1)
    log = checkout / "runs" / run / "metrics.jsonl"
    assert (read_jsonl(log)[-1]["iteration"] if log.exists() else 0) == SAID[run]
    assert len(COMMANDS) >= len(SAID)
