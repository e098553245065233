"""python -m megakd.verify: layouts agree with one rank, a planted fault is seen, and the exit code says so."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from tasks import make_rows
from tiny import tiny_folder
from train_tokenizer import train_tokenizer

from megakd import verify
from megakd.config import parse
from megakd.config.verify import VerifyConfig
from megakd.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in make_rows(32, seed=0)])
    for name, family, layers in (("student", "llama", 2), ("teacher", "gpt2", 3)):
        tiny_folder(folder / name, family, layers=layers, vocab_size=len(tokenizer))
        tokenizer.save_pretrained(folder / name)
    return folder


def config_of(root: Path, *more: str) -> VerifyConfig:
    return parse(["--model", str(root / "student"), "--teacher-model", str(root / "teacher"), *more], VerifyConfig)


def measured(layout, config: VerifyConfig, fault: bool = False):
    if fault and layout.tp_rank:
        whole = verify.supervised_hidden
        verify.supervised_hidden = lambda *given: [hidden.roll(1, -1) for hidden in whole(*given)]  # one rank's hidden states turned
    found = verify.measure(config)
    return found and {name: value.numpy() for name, value in found.items()}  # tensors would go by a file that ends with the rank


def said_by(config: VerifyConfig, fault: bool = False) -> tuple[dict[str, torch.Tensor], list]:
    """What rank 0 has of a layout, and what the others have."""
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    found, *others = run_distributed(measured, config.ranks, config, fault, tp=tp, pp=pp)
    return {name: torch.as_tensor(value) for name, value in found.items()}, others


@pytest.fixture(scope="module")
def alone(root):
    return said_by(config_of(root))[0]


LAYOUTS = {
    "TP2": ("--tp", "2"),
    "PP2": ("--pp", "2"),
    "DP2": ("--replicas", "2", "--use-distributed-optimizer"),
    "TP2 PP2 SP": ("--tp", "2", "--pp", "2", "--sequence-parallel"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_says_what_one_rank_says(name, root, alone, capsys):
    config = config_of(root, *LAYOUTS[name])
    found, others = said_by(config)
    assert not any(others) and found.keys() == alone.keys()
    assert {"student logits", "teacher logits", "gradient norm", "loss/total", "loss/total after a step"} <= alone.keys()
    assert verify.report(config, found, alone), capsys.readouterr().out


def test_a_fault_in_one_layout_is_seen(root, alone, capsys):
    config = config_of(root, "--tp", "2")
    found, _ = said_by(config, fault=True)
    assert not verify.report(config, found, alone)
    marked = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.endswith("<- differs")]
    assert "student logits" in marked and "teacher logits" in marked


def test_what_is_no_number_differs():
    nan = {"loss": torch.tensor(float("nan"))}
    assert [fits for _, fits in verify.compare(nan, {"loss": torch.tensor(1.0)}, 1.0)] == [False]
    assert [fits for _, fits in verify.compare({"loss": torch.tensor(1.2)}, {"loss": torch.tensor(1.0)}, 0.1)] == [False]
    assert [fits for _, fits in verify.compare({"loss": torch.tensor(1.05)}, {"loss": torch.tensor(1.0)}, 0.1)] == [True]


def run(python: str, *words: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([python, "-m", "megakd.verify", *map(str, words)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_command_starts_its_ranks_and_its_exit_code_says_whether_they_agree(root, python):
    said = run(python, "--model", root / "student", "--tp", "2", "--tolerance", "1e-30")
    assert said.returncode == 1, said.stderr
    assert "TP 2 × PP 1 × DP 1 and one rank, fp32" in said.stdout and "differ by more than is allowed: 1e-30 of the largest" in said.stdout


def as_under_torchrun(layout, words: list[str]) -> tuple[bool, str]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return verify.verify(words), said.getvalue()


def test_under_torchrun_the_ranks_are_its_own_and_rank_0_starts_the_one_beside_them(root):
    (agree, said), other = run_distributed(as_under_torchrun, 2, ["--model", str(root / "student"), "--tp", "2"], tp=2)
    assert agree and other == (True, "")
    assert said.startswith("TP 2 × PP 1 × DP 1 and one rank, fp32") and "the layouts agree: 0.0001 of the largest" in said
    compared = {line.split("  ")[1] for line in said.splitlines()[2:-1]}
    assert compared == {"student logits", "loss/lm", "loss/lm after a step", "gradient norm"}


@pytest.mark.parametrize("started, words, way_out", [
    ("4", ("--tp", "2"), "4 rank.s. were started, and --replicas 1 of TP × PP = 2 need 2; use --replicas 2"),
    ("3", ("--tp", "2"), "3 rank.s. were started, .* need 2; use torchrun --nproc_per_node 2"),
])  # fmt: skip
def test_ranks_that_are_no_layout_of_the_flags_are_told(started, words, way_out, root, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(UserError, match=way_out):
        verify.measure(config_of(root, *words))


@pytest.mark.parametrize("more, said", [
    (("--tp", "3"), r"--tensor-model-parallel-size 3 does not divide the 4 attention heads"),
    (("--length", "80"), r"--length 80 is more than the 64 positions of --model .*; use --length 64 or less"),
])  # fmt: skip
def test_models_that_do_not_fit_are_told_before_weights(more, said, root, monkeypatch):
    config = config_of(root, *more)
    monkeypatch.setenv("WORLD_SIZE", str(config.ranks))
    with pytest.raises(UserError, match=said):
        verify.measure(config)


@pytest.mark.parametrize("words, said", [
    ((), "--model is missing; give the student's"),
    (("--model", "x", "--rows", "3", "--replicas", "2"), "--rows 3 is not a multiple of --replicas 2"),
    (("--model", "x", "--length", "7"), "--length 7 leaves no room"),
])  # fmt: skip
def test_settings_that_cannot_be_are_told(words, said, capsys):
    with pytest.raises(SystemExit):
        parse(list(words), VerifyConfig)
    assert said in capsys.readouterr().err
