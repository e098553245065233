"""The mutants of `make mutants` still have something to change, once each. Whether the tests notice takes many minutes, and is not asked here."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MUTANTS = runpy.run_path(str(ROOT / "tests" / "mutants" / "table.py"))["MUTANTS"]


def test_there_are_enough_mutants_in_every_room():
    rooms = {mutant.file.split("/")[1].removesuffix(".py") for mutant in MUTANTS}
    expected = {"megakd_kernels", "losses", "methods", "schedules", "optimizer", "generation", "data", "checkpointing", "evaluation",
                "runtime", "models", "trainer", "reporting", "config", "preflight"}  # fmt: skip
    assert len(MUTANTS) >= 120 and expected <= rooms, expected - rooms
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_what_a_mutant_changes_stands_in_its_file_once_and_remains_python(file):
    text = (ROOT / file).read_text()
    for mutant in MUTANTS:
        if mutant.file == file:
            assert text.count(mutant.old) == 1, f"{text.count(mutant.old)} times: {mutant.old}"
            ast.parse(text.replace(mutant.old, mutant.new))
            for test in mutant.tests.split("|"):
                assert (ROOT / test.split("::")[0]).is_file(), test
