"""`--help | head`, of every command: whoever has read enough ends it, and nobody reads a traceback."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
from distributed import CONTEXT

from megakd.errors import UNREAD, UserError, quiet_pipe, told_in_one_line

ROOT = Path(__file__).parents[1]
SCRIPTS = [file for folder in ("scripts", "scripts/recipes", "checkpoint_tools") for file in sorted((ROOT / folder).glob("*.py"))]
RUN = ["scripts/pretrain_kd.py", "scripts/get_model.py", "scripts/recipes/prepare.py", "checkpoint_tools/reshard.py"]  # one of each kind


def unread(work, said: Path) -> None:
    """Where nobody reads what is printed."""
    there, here = os.pipe()
    os.close(there)
    os.dup2(here, 1)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), said.open("w", buffering=1)  # noqa: SIM115
    work()


def outcome(work, tmp_path: Path) -> tuple[int, str]:
    """Exit code and what was said on stderr."""
    said = tmp_path / "stderr"
    process = CONTEXT.Process(target=unread, args=(work, said))
    process.start()
    process.join(120)
    return process.exitcode, said.read_text()


@pytest.mark.parametrize("name", RUN)
def test_help_that_nobody_reads_to_its_end_is_quiet(name, tmp_path):
    script = ROOT / name

    def work():
        sys.argv = [name, "--help"]
        sys.path.insert(0, str(script.parent))
        runpy.run_path(str(script), run_name="__main__")

    assert outcome(work, tmp_path) == (UNREAD, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_other_command_reads_its_flags_alike(script):
    lines = script.read_text().splitlines()
    for number, line in enumerate(lines):
        if "parse_args(" in line and "def " not in line and "= parse_args()" not in line:
            assert lines[number - 1].strip() == "with quiet_pipe():", line


def prints(error: Exception | None, lines: int = 1) -> None:
    with told_in_one_line():
        print("line\n" * lines)
        if error:
            raise error


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_command_that_nobody_reads_is_quiet_and_its_errors_are_told(lines, tmp_path):
    assert outcome(lambda: prints(None, lines), tmp_path) == (UNREAD, "")
    code, said = outcome(lambda: prints(UserError("--lr 5 is wrong")), tmp_path)
    assert said == "error: --lr 5 is wrong\n" and code == 2
    code, said = outcome(lambda: prints(BrokenPipeError("a socket's")), tmp_path)
    assert code == UNREAD  # whose, nobody can say where stdout is closed as well


def test_a_broken_pipe_that_is_not_our_output_keeps_its_traceback(capsys):
    with pytest.raises(BrokenPipeError), quiet_pipe():
        raise BrokenPipeError
    with pytest.raises(ZeroDivisionError), quiet_pipe():
        print(1 / 0)
