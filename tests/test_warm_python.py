"""The python that has imported the libraries before: its programs end with whoever asked, and heed what python reads of the environment."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from test_stop import wait_until

FORKS = """
import os, sys, time
children = [os.fork() or os._exit(time.sleep(60)) for _ in range(2)]
open(sys.argv[1], "w").write(" ".join(map(str, [os.getpid(), *children])))
time.sleep(60)
"""


def is_at_work(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux alone has such a python")
def test_a_program_that_is_killed_takes_with_it_what_it_has_forked(python, tmp_path):
    file = tmp_path / "processes"
    asked = subprocess.Popen([python, "-c", FORKS, str(file)], start_new_session=True)
    wait_until(lambda: file.exists() and len(file.read_text().split()) == 3)
    processes = [int(number) for number in file.read_text().split()]
    assert all(map(is_at_work, processes))
    os.killpg(asked.pid, signal.SIGKILL)
    asked.wait()
    wait_until(lambda: not any(map(is_at_work, processes)))


@pytest.mark.parametrize("word", ["", "1"])
def test_bytecode_is_written_as_the_environment_says(python, word):
    command = [python, "-c", "import sys; print(sys.dont_write_bytecode)"]
    said = subprocess.run(command, env=os.environ | {"PYTHONDONTWRITEBYTECODE": word}, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(bool(word))
