"""Every command of the README does what it says, in order, as a newcomer would type it."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "python": ["python"],
    "torchrun": ["python", "-m", "torch.distributed.run"],
    "make": ["make", "--file", str(ROOT / "Makefile")],
    "bash": ["bash"],
}


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


COMMANDS = commands((ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder that looks like the repository, so that what the commands write stays out of it."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("scripts", "checkpoint_tools", "configs", "tests", "Makefile", "setup.py", "megakd", "kernels"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def words_of(command: str, python: str) -> list[str]:
    """`make` only shows what it would run: this test is what `make test` runs, and the environment is there already."""
    name, *rest = shlex.split(command)
    if command == "make quickstart":
        return [python, "scripts/quickstart.py", "--out", "quickstart"]
    words = [*LAUNCHERS[name], *(["--dry-run"] if name == "make" else []), *rest]
    return [python, *words[1:]] if words[0] == "python" else words


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_a_command_of_the_readme_runs(checkout, python, command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(words_of(command, python), cwd=checkout, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def table(text: str) -> list[list[float]]:
    """Numbers of the README's table of the quick start: exact match in %, Rouge-L, KL."""
    rows = re.findall(r"^\| [^|]*\| \**([\d.]+) %\** \| \**([\d.]+)\** \| \**([\d.]+)\** \|$", text, re.MULTILINE)
    return [list(map(float, row)) for row in rows]


def test_the_quick_start_gives_the_table_of_the_readme(checkout):
    """Of the run that the README's first command has just made; another CPU rounds otherwise, and training spreads that a little."""
    names = ("teacher", "student", "student-longer", "promptkd")
    files = [checkout / "quickstart" / "evaluation" / name / "results.json" for name in names]
    if not all(file.is_file() for file in files):
        pytest.skip("the quick start has not run: run this file as a whole")
    got = [json.loads(file.read_text())["sets"]["test"] for file in files]
    shown = table((ROOT / "README.md").read_text())
    assert len(shown) == 4
    for row, (exact_match, rouge_l, kl) in zip(got, shown):
        assert row["exact_match"] == pytest.approx(exact_match, abs=5) and row["rouge_l"] == pytest.approx(rouge_l, abs=3)
        assert row["reverse_kl"] == pytest.approx(kl, rel=0.2, abs=0.02)
    with (checkout / "quickstart" / "comparison.csv").open() as file:
        drawn = list(csv.reader(file))
    assert len(drawn) >= 5


def test_make_quickstart_is_what_was_run_here():
    shown = subprocess.run(["make", "-n", "-C", str(ROOT), "quickstart"], capture_output=True, text=True).stdout
    assert "scripts/quickstart.py --out quickstart" in shown


def test_the_readme_is_short_and_its_documents_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for name in re.findall(r"`(docs/[\w./]+|benchmarks/[\w./]+|tests/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
