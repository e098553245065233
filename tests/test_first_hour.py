"""The first hour on a GPU machine in one command: every stage at its smallest, on whatever device there is; what failed is in the archive."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAKE = """#!/usr/bin/env bash
echo "$*" >> {calls}
if [[ "$*" == {broken} ]]; then echo "out of memory"; exit 1; fi
if [[ "$*" == *report.py* ]]; then mkdir -p {out}/small/report; echo "the table" > {out}/small/report/table.md; fi
"""


def first_hour(*words, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", ROOT / "scripts" / "first_hour.sh", *words], capture_output=True, text=True, env=os.environ | environment
    )


def packed(out: Path) -> dict[str, str]:
    with tarfile.open(out / "first_hour.tar.gz") as archive:
        return {member.name.removeprefix("./"): archive.extractfile(member).read().decode(errors="replace") for member in archive}


def test_the_smallest_of_everything_runs_here_and_is_packed(python, tmp_path):
    done = first_hour(tmp_path, "--smoke", PYTHON=python)
    assert done.returncode == 0, done.stdout + done.stderr
    files = packed(tmp_path)
    assert files["failed.txt"] == "none\n"
    assert "PyTorch version" in files["logs/machine.log"] and "megatron-core==" in files["logs/machine.log"]
    assert "commit " in files["logs/machine.log"]
    assert "[100%]" in files["logs/kernel_tests.log"]
    assert "not started" in files["kernels.csv"] and "iteration_s" in files["iteration.csv"]
    assert "promptkd" in files["logs/recipe.log"]
    again = first_hour(tmp_path, "--smoke", PYTHON=python)
    assert again.returncode == 0 and again.stdout.count("skipped") == 5


def with_fake_python(folder: Path, broken: str, *words) -> tuple[subprocess.CompletedProcess, str]:
    fake, calls = folder / "python", folder / "calls"
    fake.write_text(FAKE.format(calls=calls, broken=broken, out=folder / "out"))
    fake.chmod(0o755)
    done = first_hour(folder / "out", *words, PYTHON=str(fake), DATA=str(folder))
    return done, calls.read_text() if calls.exists() else ""


def test_a_failed_stage_is_packed_with_its_log_and_the_others_run(tmp_path):
    done, calls = with_fake_python(tmp_path, "*benchmark_kernels.py*")
    assert done.returncode == 1 and "1 of the stages failed (benchmark_kernels)" in done.stdout.splitlines()[-1]
    assert "benchmark.py" in calls.split("benchmark_kernels.py")[1], "the next stage ran"
    files = packed(tmp_path / "out")
    assert files["small/report/table.md"] == "the table\n"
    assert files["failed.txt"] == "benchmark_kernels\n" and files["logs/benchmark_kernels.log"] == "out of memory\n"
    (tmp_path / "calls").unlink()
    (tmp_path / "out" / "small" / "model.safetensors").write_bytes(b"x")
    done, calls = with_fake_python(tmp_path, "nothing")
    assert done.returncode == 0 and "kernel_tests" not in calls and "benchmark_kernels.py" in calls, "only what had failed runs again"
    assert not [name for name in packed(tmp_path / "out") if name.endswith("safetensors")]


def test_a_dry_run_prints_every_stage_and_writes_nothing(tmp_path):
    done, calls = with_fake_python(tmp_path, "nothing", "--dry-run")
    assert done.returncode == 0 and calls == "" and not (tmp_path / "out").exists()
    for stage in ("machine", "kernel_tests", "captured_steps", "benchmark_kernels", "benchmark", "recipe"):
        assert f"== {stage}\n" in done.stdout
