"""The command in python's place does what python would: arguments, streams, folder, exit codes, and an end with whoever waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from megakd.runtime.peers import state_of


def said_by(python: str, *words: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([python, *map(str, words)], capture_output=True, text=True, **options)


def test_a_program_has_its_arguments_folder_environment_streams_and_exit_code(python, tmp_path):
    (tmp_path / "beside.py").write_text("word = 'beside'\n")
    program = tmp_path / "program.py"
    program.write_text("import os, sys, beside\nprint(sys.argv[1:], beside.word, os.getcwd(), os.environ['MINE'], sys.stdin.read(), sys.executable)\n")
    done = said_by(python, program, "a", "b c", cwd="/", env=os.environ | {"MINE": "x"}, input="typed")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"['a', 'b c'] beside / x typed {python}\n", "")


def test_its_end_is_pythons(python):
    ends = {"raise SystemExit('no')": (1, "no"), "import sys; sys.exit(3)": (3, ""), "1 / 0": (1, "ZeroDivisionError: division by zero"), "": (0, "")}
    for text, (code, error) in ends.items():
        done = said_by(python, "-c", text)
        assert done.returncode == code and (done.stderr.splitlines() or [""])[-1] == error
    assert said_by(python, "-c", "import atexit, sys; atexit.register(print, sys.argv)", "a").stdout == "['-c', 'a']\n"
    assert "usage: " in said_by(python, "-m", "torch.distributed.run", "--help").stdout


def test_modules_of_the_project_are_read_anew(python):
    done = said_by(python, "-c", "import sys; print([name for name in sys.modules if name.partition('.')[0] in ('megakd', 'megakd_kernels', 'tiny')])")
    assert done.stdout == "[]\n", done.stderr


SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
LAUNCH = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP!r}])"


@pytest.mark.parametrize("program", [SLEEP, LAUNCH])
def test_it_ends_with_whoever_waits_for_it_and_so_does_what_it_started(python, program):
    with subprocess.Popen([python, "-u", "-c", program], stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 20
    while state_of(pid) not in "XZ":
        assert time.monotonic() < end
        time.sleep(0.01)
