"""Shared set-up: one thread a rank, no network, tiny models and the real data where it is there."""

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # `from distributed import run_distributed`
sys.path.extend(str(Path(__file__).parents[1] / folder) for folder in ("scripts", "benchmarks"))  # `from tasks import make_rows`

import pytest
import torch
import warm_python

torch.set_num_threads(1)  # before any fork: a child of a multi-threaded torch may hang
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where Triton is imported, which may be anywhere


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data, not part of the repository: tests that need it skip plainly where it is absent."""
    folder = Path(os.environ.get("MEGAKD_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set MEGAKD_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def python() -> Iterator[str]:
    """A command in python's place that has imported the libraries before (tests/warm_python.py), where the system is Linux."""
    if not hasattr(os, "pidfd_open"):
        yield sys.executable
        return
    with tempfile.TemporaryDirectory() as folder:  # short, as the name of a socket has to be
        command, server = warm_python.start(Path(folder))
        yield str(command)
        server.kill(), server.wait()


class Noted:
    """What has been told so far in the notes that errors.tell prints."""

    def __init__(self, capsys):
        self.capsys, self.lines = capsys, []

    @property
    def messages(self) -> list[str]:
        self.lines += [line.removeprefix("note: ") for line in self.capsys.readouterr().err.splitlines() if line.startswith("note: ")]
        return self.lines

    def clear(self) -> None:
        self.messages.clear()


@pytest.fixture
def noted(capsys) -> Noted:
    """The notes that a test's readers print."""
    return Noted(capsys)


LONGEST_FIRST = (  # files of more than half a minute: with two workers, neither is left with one of them at the end
    "test_readme", "test_methods", "test_real_model", "test_iterations", "test_drill", "test_generation", "test_lora", "test_planning",
    "test_conversion", "test_stored_teacher", "test_relayed_teachers", "test_families", "test_trainer", "test_dry_run",
)  # fmt: skip


def pytest_collection_modifyitems(items: list) -> None:
    """The others as they lie."""
    items.sort(key=lambda item: LONGEST_FIRST.index(item.path.stem) if item.path.stem in LONGEST_FIRST else len(LONGEST_FIRST))


def pytest_collection_finish() -> None:
    """What the libraries have made stays: a collection of the oldest generation, in each of the ranks that are forked from here, would look at
    a million objects, half a second, and copy their pages."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """Python ends as it would have."""
    gc.unfreeze()
