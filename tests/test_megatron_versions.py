"""The newest megatron-core goes on with a run that the base one began, and the base one with what the newest wrote, as if nothing had happened."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import megatron.core
import pytest
from distributed import run_distributed
from packaging.requirements import Requirement
from test_trainer import command, numbers, run, write_inputs

from megakd.checkpointing.native import write_latest

NEWEST = "0.19.2"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def newest(pytestconfig) -> Path:
    """A folder for PYTHONPATH with that version unpacked: its wheels are for Python 3.12 and later, its code runs on 3.11 too."""
    folder = pytestconfig.cache.mkdir("megatron_core") / NEWEST
    if not folder.is_dir():
        wheels = folder.with_name(f"{NEWEST}.wheels.{os.getpid()}")
        of_312 = ("--only-binary", ":all:", "--python-version", "3.12", "--no-deps", "--timeout", "10", "--retries", "0")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", f"megatron-core=={NEWEST}", *of_312, "--dest", wheels],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"megatron-core {NEWEST} cannot be had: {done.stderr.strip().splitlines()[-1]}")
        zipfile.ZipFile(next(wheels.glob("*.whl"))).extractall(wheels / "unpacked")
        (wheels / "unpacked").rename(folder)
        shutil.rmtree(wheels)
    return folder


TRAIN = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
import megatron.core
print(megatron.core.__version__)
"""


def with_newest(newest: Path, *words: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(newest), "NO_VCS_VERSION": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def assert_equal(rows: list[dict], expected: list[dict]) -> None:
    for row, as_expected in zip(rows, expected, strict=True):
        assert row == pytest.approx(as_expected, rel=1e-6)


def test_setup_py_takes_the_base_and_the_newest():
    line = re.search(r'"(megatron-core.*?)"', (ROOT / "setup.py").read_text()).group(1)
    assert {"0.16.1", NEWEST} <= set(Requirement(line).specifier.filter(["0.15.0", "0.16.1", NEWEST, "0.20.0"]))
    assert not set(Requirement(line).specifier.filter(["0.15.0", "0.20.0"])), "nobody has tried these"


@pytest.mark.skipif(megatron.core.__version__ == NEWEST, reason="the newest is the one that is installed")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="the newest does not run on Python 3.10")
def test_base_and_newest_continue_each_others_runs(newest, tmp_path):
    inputs = write_inputs(tmp_path)
    settings = {"save-interval": 1, "eval-interval": 4}
    words = lambda save: command(inputs, save, "promptkd", **settings)
    run_distributed(run, 1, words("unbroken"))
    run_distributed(run, 1, words("handed"), 2)  # iteration 1
    said = with_newest(newest, "-c", TRAIN, ROOT / "scripts" / "pretrain_kd.py", *words("handed"))  # to the end
    assert said.stdout.splitlines()[-1] == NEWEST
    assert_equal(numbers(inputs / "handed"), numbers(inputs / "unbroken"))
    checkpoints = inputs / "handed" / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000004")
    write_latest(checkpoints, 3)  # of the newest
    run_distributed(run, 1, words("handed"))
    assert_equal(numbers(inputs / "handed"), numbers(inputs / "unbroken"))
