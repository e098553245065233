"""Every command of the README does what it says, in order, as a newcomer would type it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
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


def words_of(command: str) -> list[str]:
    """`make` only shows what it would run: this test is what `make test` runs, and the environment is there already."""
    name, *rest = shlex.split(command)
    if command == "make quickstart":
        return [sys.executable, "scripts/quickstart.py", "--out", "quickstart"]
    return [*LAUNCHERS[name], *(["--dry-run"] if name == "make" else []), *rest]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[:60])
def test_a_command_of_the_readme_runs(checkout, command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(words_of(command), cwd=checkout, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_make_quickstart_is_what_was_run_here():
    shown = subprocess.run(["make", "-n", "-C", str(ROOT), "quickstart"], capture_output=True, text=True).stdout
    assert "scripts/quickstart.py --out quickstart" in shown


def test_the_readme_is_short_and_its_documents_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for name in re.findall(r"`(docs/[\w./]+|benchmarks/[\w./]+|tests/[\w./]+)`", text):
        assert (ROOT / name).exists(), name
