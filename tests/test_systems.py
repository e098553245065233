"""The comparison with other systems times equal work only, each system in processes of its own, and leaves a table, a CSV and figures."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import CONTEXT
from megakd_benchmarks.systems import run, turns
from megakd_benchmarks.systems.report import table
from megakd_benchmarks.systems.workload import make_task

from megakd.config import SystemsConfig
from megakd.errors import UserError


@pytest.fixture
def config(data_folder, tmp_path):
    """Two layers each, eight tokens a response."""
    sizes = {"student_layers": 2, "student_hidden": 128, "teacher_layers": 2, "teacher_hidden": 128}
    data = {"data": str(data_folder / "minillm" / "dolly" / "valid.jsonl"), "tokenizer": str(data_folder / "tokenizers" / "gpt2")}
    sizes |= {"global_batch_size": 4, "micro_batch_size": 2, "max_prompt_length": 64, "max_new_tokens": 8}
    return SystemsConfig(**sizes, **data, repetitions=2, threads=1, out=str(tmp_path / "systems"))


@pytest.fixture
def forked(monkeypatch):
    """Processes that import nothing; those of `Failing` begin as a user's do."""
    monkeypatch.setattr(turns, "multiprocessing", SimpleNamespace(get_context=lambda name: CONTEXT))


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def test_systems_that_compute_the_same_are_timed_in_turn_and_kept(config, forked, tmp_path, capsys):
    others = ("trl", "liger") if installed("trl", "liger_kernel") else ()
    config = replace(config, systems=("megakd", "megakd-tp2", "transformers", *others))
    run.run(config)
    rows = list(csv.DictReader((tmp_path / "systems.csv").open()))
    assert [row["system"] for row in rows] == list(config.systems)
    assert rows[0]["iteration_ratio"] == rows[0]["peak_ratio"] == "1" and float(rows[2]["peak_ratio"]) > 0
    assert all(float(row["iteration_s"]) > 0 and float(row["cpu_s"]) > 0 and row["commit"] for row in rows)
    assert all(float(row["generation_tokens_per_s"]) > 0 for row in rows if row["system"] != "trl")
    assert (tmp_path / "systems.png").stat().st_size > 10_000
    assert capsys.readouterr().out.count("iteration ") >= 4


class WrongLoss:
    """A system whose loss is another one."""

    def __init__(self, config, task, models):
        self.task = task

    def run(self, turn):
        for _ in self.task.prompts:
            turn.begin()
            turn.end(123.0)


class Failing(WrongLoss):
    """A system that cannot start."""

    def __init__(self, config, task, models):
        raise UserError("no memory for it")


class RightLoss(WrongLoss):
    """The same with another number."""

    def run(self, turn):
        for _ in self.task.prompts:
            turn.begin()
            turn.end(1.0)


def refused(config, message: str, monkeypatch, **known) -> None:
    monkeypatch.setattr(run, "maker", {name: (kind, 1) for name, kind in known.items()}.__getitem__)
    with pytest.raises(UserError, match=message):
        run.run(replace(config, systems=tuple(known)))
    assert not list(Path(config.out).parent.iterdir())


def test_a_system_that_does_other_work_is_not_timed(config, forked, monkeypatch):
    refused(config, "not the same work", monkeypatch, megakd=RightLoss, transformers=WrongLoss)


def test_a_system_that_ends_is_not_timed(config, monkeypatch):
    refused(config, "megakd ended before its time", monkeypatch, megakd=Failing, transformers=WrongLoss)


def test_text_and_tokens_are_of_the_same_prompts(config):
    task = make_task(replace(config, repetitions=1))
    assert len(task.prompts) == len(task.texts) == 3 and all(len(batch) == 4 for batch in task.prompts)
    assert len({prompt for batch in task.prompts for prompt in batch}) == 12 and task.longest_prompt <= 64


def test_a_system_that_is_not_installed_is_named_before_anything_is_made(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", None)
    with pytest.raises(UserError, match=r"--systems liger needs liger_kernel\.chunked_loss; pip install"):
        run.run(replace(config, systems=("megakd", "liger")))


def test_a_table_has_what_was_measured_and_how_many_times_the_first():
    row = {"system": "megakd", "iteration_s": 2.0, "cpu_s": 4.0, "peak_mib": 100.0, "iteration_ratio": 1.0, "cpu_ratio": 1.0, "peak_ratio": 1.0}
    theirs = row | {"system": "trl", "iteration_s": 5.0, "iteration_ratio": 2.5}
    shown = table([row, theirs])
    assert "5.00 s (2.50)" in shown and "100 MiB (1.00)" in shown
