"""Every command of the README does what it says, in order, as a newcomer would type it.

`make quickstart` takes a tenth of its iterations: the same commands, for the others to go on with. As long as it is, it gives the README's
table: `pytest -m slow tests/test_readme.py`, which `make drill` runs.
"""

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
        return [python, "scripts/quickstart.py", "--out", "quickstart", "--share", "0.1"]
    words = [*LAUNCHERS[name], *(["--dry-run"] if name == "make" else []), *rest]
    return [python, *words[1:]] if words[0] == "python" else words


def ran(words: list[str], checkout: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_a_command_of_the_readme_runs(checkout, python, command):
    ran(words_of(command, python), checkout)


def table(text: str) -> list[list[float]]:
    """Numbers of the README's table of the quick start: exact match in %, Rouge-L, KL."""
    rows = re.findall(r"^\| [^|]*\| \**([\d.]+) %\** \| \**([\d.]+)\** \| \**([\d.]+)\** \|$", text, re.MULTILINE)
    return [list(map(float, row)) for row in rows]


def results(folder: Path) -> list[dict[str, float]]:
    """Of the quick start's four models, in the order of the table; its comparison has been drawn."""
    with (folder / "comparison.csv").open() as file:
        assert len(list(csv.reader(file))) >= 5 and (folder / "comparison.png").stat().st_size > 10_000
    names = ("teacher", "student", "student-longer", "promptkd")
    return [json.loads((folder / "evaluation" / name / "results.json").read_text())["sets"]["test"] for name in names]


def test_a_tenth_of_the_quick_start_brings_the_student_nearer_to_its_teacher(checkout):
    """Of the run that the README's first command has just made."""
    if not (checkout / "quickstart" / "comparison.csv").is_file():
        pytest.skip("the quick start has not run: run this file as a whole")
    teacher, student, _, distilled = results(checkout / "quickstart")
    assert teacher["reverse_kl"] == pytest.approx(0, abs=1e-6) and 0 < distilled["reverse_kl"] < student["reverse_kl"]


@pytest.mark.slow
def test_the_quick_start_gives_the_table_of_the_readme(checkout, python):
    """Another CPU rounds otherwise, and training spreads that a little."""
    ran([python, "scripts/quickstart.py", "--out", "whole"], checkout)
    shown = table((ROOT / "README.md").read_text())
    assert len(shown) == 4
    for row, (exact_match, rouge_l, kl) in zip(results(checkout / "whole"), shown):
        assert row["exact_match"] == pytest.approx(exact_match, abs=5) and row["rouge_l"] == pytest.approx(rouge_l, abs=3)
        assert row["reverse_kl"] == pytest.approx(kl, rel=0.2, abs=0.02)


def test_make_quickstart_is_what_was_run_here():
    shown = subprocess.run(["make", "-n", "-C", str(ROOT), "quickstart"], capture_output=True, text=True).stdout
    assert "scripts/quickstart.py --out quickstart" in shown


def test_the_readme_is_short_and_its_documents_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for name in re.findall(r"`(docs/[\w./]+|benchmarks/[\w./]+|tests/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
