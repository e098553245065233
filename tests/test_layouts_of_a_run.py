"""Saved at TP 2, every method goes on at PP 2, DP 2 and TP 1 as the unbroken run does: the same rows in the same order, the same numbers."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from distributed import run_distributed
from test_trainer import command, numbers, write_inputs

from megakd import trainer
from megakd.config import Config, parse
from megakd.data.dataloader import DataLoader
from megakd.reporting.jsonl import read_jsonl

ZERO = {"use-distributed-optimizer": True}
CASES = {  # method and flags; none has dropout, and a phase of MiniLLM is one batch, which each replica shuffles by itself
    "sft, distributed optimizer": ("sft", ZERO),
    "kd": ("kd", {"on-policy-ratio": 0.5, "seed": 1}),
    "kd, adapters, distributed optimizer": ("kd", {"lora-rank": 4, "on-policy-ratio": 0.5, **ZERO}),
    "seqkd": ("seqkd", {"kd-ratio": 0.5}),
    "minillm": ("minillm", {"num-rollouts": 4, "ppo-epochs": 2}),
    "distillm": ("distillm", {"replay-capacity": 12, "lr": 0.05, "eval-interval": 1, "seed": 7}),
    "promptkd, distributed optimizer": ("promptkd", ZERO),
    "response_priming": ("response_priming", {"teacher-priming": "Think."}),
}
LAYOUTS = {"TP2": (2, 1, 1), "PP2": (1, 2, 1), "DP2": (1, 1, 2), "TP1": (1, 1, 1)}  # TP, PP, DP
WRITES = {"kd", "seqkd", "minillm", "distillm", "promptkd"}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def configs(root) -> dict[str, Config]:
    """Of each case, read once; DistiLLM learns from its evaluations, the others have none."""
    read = {name: parse(arguments(root, *CASES[name])) for name in CASES}
    return {name: one if name == "distillm" else replace(one, data=replace(one.data, valid_data="")) for name, one in read.items()}


def arguments(root: Path, method: str, flags: dict) -> list[str]:
    usual = {"micro-batch-size": 2, "global-batch-size": 4, "eval-iters": 1}
    usual |= {} if method == "minillm" else {"hidden-dropout": 0, "attention-dropout": 0}
    usual |= {"save-rollouts": True} if method in WRITES else {}
    return command(root, "run", method, **(usual | flags))


def at(config: Config, layout: str, save: Path, resume: str) -> Config:
    tp, pp, _ = LAYOUTS[layout]
    parallel = replace(config.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    output, running = replace(config.output, save=str(save)), replace(config.running, resume=resume)
    return replace(config, parallel=parallel, output=output, running=running)


def all_cases(_layout, configs: dict[str, Config]) -> dict[str, list]:
    """Each case's run on this rank; the rows that this replica was given, in the order in which it was."""
    given, samples = [], DataLoader.samples

    def noted(loader, iteration):
        found = samples(loader, iteration)
        given.append((iteration, [sample.sample_id for sample in found]))
        return found

    DataLoader.samples = noted
    trainer.export_to_hf = trainer.plot_training = lambda *_, **options: None  # not what is asked here
    found = {}
    for name, config in configs.items():
        given.clear()
        trainer.train(config)
        found[name] = list(given)
    return found


def rows_of(replicas: list[list]) -> list[list]:
    """Of each batch that was asked for, which iteration's it is, and its rows."""
    return [(parts[0][0], sorted(number for _, ids in parts for number in ids)) for parts in zip(*replicas)]


def told(configs: dict[str, Config], root: Path, layout: str, folder: str, resume: str = "latest") -> dict[str, dict]:
    """Of each case: rows, numbers and responses of every iteration."""
    tp, pp, dp = LAYOUTS[layout]
    here = {name: at(config, layout, root / folder / name, resume) for name, config in configs.items()}
    replicas = run_distributed(all_cases, tp * pp * dp, here, tp=tp, pp=pp, timeout=600)[:dp]
    return {name: of_a_run(root / folder / name, rows_of([replica[name] for replica in replicas])) for name in CASES}


def of_a_run(folder: Path, rows: list) -> dict:
    written = defaultdict(dict)
    for row in read_jsonl(folder / "rollouts.jsonl") if (folder / "rollouts.jsonl").exists() else ():
        written[row["iteration"]][row["sample_id"]] = row["response"]
    return {"rows": rows, "numbers": numbers(folder), "written": dict(written)}


@pytest.fixture(scope="module")
def unbroken(root, configs) -> dict[str, dict]:
    found = told(configs, root, "TP2", "TP2")
    for layout in ("PP2", "DP2", "TP1"):
        shutil.copytree(root / "TP2", root / layout)
    return found


@pytest.fixture(scope="module")
def resumed(root, configs, unbroken):
    """By layout."""
    return cache(lambda layout: told(configs, root, layout, layout, "2"))


@pytest.mark.parametrize("layout", ["PP2", "DP2", "TP1"])
@pytest.mark.parametrize("name", CASES)
def test_a_run_saved_at_tp2_goes_on_at_another_layout(name, layout, unbroken, resumed):
    whole, rest = unbroken[name], resumed(layout)[name]
    first, *after = rest["rows"]  # of the run, which a method may ask for when it is built
    assert first == whole["rows"][0] and after and after == whole["rows"][-len(after) :]
    assert rest["written"] == whole["written"] and bool(whole["written"]) == (CASES[name][0] in WRITES)
    assert [row["iteration"] for row in rest["numbers"]] == [row["iteration"] for row in whole["numbers"]]
    for ours, theirs in zip(rest["numbers"], whole["numbers"]):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), f"iteration {theirs['iteration']}"
