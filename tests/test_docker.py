"""The Dockerfiles, which nobody has built here, install what setup.py and the Makefile say, of files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SETUP, MAKE = (ROOT / "setup.py").read_text(), (ROOT / "Makefile").read_text()
NGC_TORCH = {"26.01": "2.10.0a0", "26.02": "2.11.0a0", "26.03": "2.11.0a0", "26.05": "2.12.0a0"}  # of the image's release notes
files = pytest.mark.parametrize("name", ["ngc", "cuda"])


def steps(name: str) -> list[str]:
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "docker" / f"{name}.Dockerfile").read_text(), flags=re.M)
    return [line for line in text.splitlines() if line]


def required(package: str) -> Requirement:
    return Requirement(re.search(rf"""["']({package}\b.*?)["'],""", SETUP).group(1))


@files
def test_the_base_and_torch_are_those_of_setup_py(name):
    text = "\n".join(steps(name))
    assert re.search(r'"(megatron-core==[\d.]+)"', text).group(1) == re.search(r"MEGATRON \?= (.*)", MAKE).group(1)
    base = steps(name)[0]
    if name == "ngc":
        torch = NGC_TORCH[re.fullmatch(r"FROM nvcr\.io/nvidia/pytorch:([\d.]+)-py3", base).group(1)]
    else:
        assert re.fullmatch(r"FROM nvidia/cuda:13\.0\.\d-cudnn-devel-ubuntu24\.04", base), "of the CUDA that torch's own build is for"
        torch = re.search(r'"torch==([\d.]+)"', text).group(1)
        assert f"torch=={torch}" == re.search(r"TORCH \?= (.*)", MAKE).group(1)
    assert required("torch").specifier.contains(Version(torch), prereleases=True)
    assert not required("torch").specifier.contains("2.10.0a0", prereleases=True), "an image with it would have pip look for another torch"


@files
def test_extras_and_copied_files_exist(name):
    extras = set(re.findall(r'^        "(\w+)": \[', SETUP, flags=re.M))
    for asked in re.findall(r'"\.\[([\w,]+)\]"', "\n".join(steps(name))):
        assert set(asked.split(",")) <= extras
    copied = [word for step in steps(name) if step.startswith("COPY ") for word in step.split()[1:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)
    for part in ("megakd", "kernels", "scripts", "tests", "setup.py"):
        assert part in copied


@files
def test_nothing_is_built_apart_from_the_images_own_torch(name):
    for step in steps(name):
        if "flash-attn" in step or ".[gpu" in step:
            assert "--no-build-isolation" in step
