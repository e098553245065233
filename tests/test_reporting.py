"""A run's files hold every iteration once, whatever interrupted it; the figures show them; the FLOPs are the matrix products'."""

import csv
import json
import math
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megakd.errors import UserError
from megakd.reporting import wandb_run
from megakd.reporting.flops import TransformerSizes, forward_flops_per_token, peak_flops
from megakd.reporting.logger import RunLogger, progress_line
from megakd.reporting.plots import panels_of, plot_comparison, plot_training, series_of
from megakd.reporting.stopwatch import Stopwatch
from megakd.reporting.wandb_run import WandbRun, check_installed


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder, iterations, *, value=1.0, resumed_iteration=None, enabled=True):
    logger = RunLogger(folder, total_iterations=9, enabled=enabled, resumed_iteration=resumed_iteration)
    for iteration in iterations:
        logger.log(iteration, {"loss/lm": value, "time/rollout": 0.5})
        logger.log_samples(iteration, [{"prompt": "a", "response": "b"}])
    logger.close()


def events_of(folder) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("loss/lm")]


def test_the_line_names_every_part_and_the_time_to_go():
    metrics = {
        "loss/reverse_kl": 0.41274,
        "grad_norm": 0.912,
        "lr": 4.8e-6,
        "tokens_per_second": 38412.4,
        "memory_gib": 41.23,
        "time/rollout": 1.204,
        "shared_ids": 50257,
    }
    assert progress_line(120, 5000, metrics, 3912.3) == (
        "iteration  120/5000 | loss/reverse_kl 0.4127 | grad_norm 0.91 | lr 4.8e-06 | 38,412 tok/s | 41.2 GiB | "
        "rollout 1.20 s | shared_ids 5.026e+04 | ETA 1:05:12"
    )


def test_a_resumed_run_has_every_iteration_once(tmp_path, capsys):
    run(tmp_path, range(1, 7))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "loss/l')  # killed while writing
    run(tmp_path, range(5, 10), value=2.0, resumed_iteration=4)
    expected = [(i, 1.0 if i <= 4 else 2.0) for i in range(1, 10)]
    assert [(row["iteration"], row["loss/lm"]) for row in rows_of(tmp_path / "metrics.jsonl")] == expected
    assert [row["iteration"] for row in rows_of(tmp_path / "samples.jsonl")] == list(range(1, 10))
    assert events_of(tmp_path) == expected
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("iteration 1/9 | loss/lm 1.0000 | rollout 0.50 s | ETA 0:00:0")
    assert lines[-1].endswith("| ETA 0:00:00")


@pytest.mark.parametrize(
    "eval_interval, etas",
    [(4, [39, 38, 37, 36, 26, 25, 24, 23, 22, 12, 11, 10, 0]), (None, [19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 0])],
    ids=["every 4", "at the end"],
)
def test_iterations_and_evaluations_to_come_are_estimated_each_by_its_own_time(tmp_path, monkeypatch, capsys, eval_interval, etas):
    clock = [0.0]
    monkeypatch.setattr("megakd.reporting.logger.time.perf_counter", lambda: clock[0])
    logger = RunLogger(tmp_path, total_iterations=10, enabled=True, eval_interval=eval_interval)

    def log(iteration, name, seconds):
        clock[0] += seconds
        logger.log(iteration, {name: 1.0})

    log(0, "valid/lm_loss", 10)
    for iteration in range(1, 11):
        log(iteration, "loss/lm", 1)
        if iteration == 10 or (eval_interval and iteration % eval_interval == 0):
            log(iteration, "valid/lm_loss", 10)
    first, *lines = capsys.readouterr().out.splitlines()
    assert "ETA" not in first  # no iteration to estimate from yet
    assert [line.rpartition("ETA ")[2] for line in lines] == [f"0:00:{seconds:02d}" for seconds in etas]


def test_a_new_run_starts_its_files_afresh(tmp_path):
    run(tmp_path, range(0, 5))
    run(tmp_path, range(1, 3), value=2.0)
    assert [(row["iteration"], row["loss/lm"]) for row in rows_of(tmp_path / "metrics.jsonl")] == [(1, 2.0), (2, 2.0)]


def test_other_ranks_write_nothing(tmp_path, capsys):
    run(tmp_path / "run", range(1, 3), enabled=False)
    assert (list(tmp_path.iterdir()), capsys.readouterr().out) == ([], "")


def test_a_loss_that_is_not_a_number_is_null_in_the_file_and_nan_on_the_line(tmp_path, capsys):
    run(tmp_path, [1], value=math.nan)
    assert rows_of(tmp_path / "metrics.jsonl")[0]["loss/lm"] is None
    assert "loss/lm nan" in capsys.readouterr().out


def test_figures_come_with_their_numbers(tmp_path):
    logger = RunLogger(tmp_path, total_iterations=60, enabled=True, log_interval=60)
    for i in range(61):
        held_out = {"valid/kl": 1 / (1 + i), "valid/novel": 3.0} if i % 20 == 0 else {}
        logger.log(i, {"loss/lm": 2.0, "grad_norm": 1.0, "time/rollout": 0.1, "time/teacher": 0.2} | held_out)
    logger.close()
    picture, numbers = plot_training(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = list(csv.DictReader(numbers.open()))
    assert (len(table), table[20]["valid/kl"], table[21]["valid/kl"]) == (61, str(1 / 21), "")

    results = {"SFT": {"exact_match": 61.0, "exact_match_sd": 2.0}, "PromptKD": {"exact_match": 74.0}}
    picture, numbers = plot_comparison(results, {"exact_match": "%"}, tmp_path / "comparison.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert numbers.read_text().split() == ["method,exact_match,exact_match_sd", "SFT,61.0,2.0", "PromptKD,74.0,"]


def test_every_number_but_counts_is_drawn_in_its_panel():
    names = ("loss/lm", "loss/hidden", "grad_norm", "grad_norm/prompt", "lr", "on_policy_share", "real_share", "memory_gib", "tokens_per_second")
    names += ("time/teacher", "valid/gsm8k_strict", "valid/response_length", "my_own", "tokens", "positions")
    panels = panels_of(series_of([{"iteration": 1, **dict.fromkeys(names, 1.0)}]))
    drawn = [name for _, _, shown in panels for name in shown]
    assert sorted(drawn) == sorted(set(names) - {"tokens", "positions"})
    assert ("DistiLLM's share of own text", "of batches", ["on_policy_share"]) in panels and ("my_own", "", ["my_own"]) in panels
    assert ("Held-out GSM8K, strict", "% of answers", ["valid/gsm8k_strict"]) in panels


# ---- Weights & Biases


class StandIn:
    """wandb's functions that are used, noted."""

    class Error(Exception):
        pass

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*words, **options):
            self.calls.append((name, words, options))
            return self

        return call


def logged_to_wandb(folder, monkeypatch, *, resumed=None) -> list:
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    own = WandbRun(folder, "distil", "", {"lr": 1e-3}, continued=resumed is not None)
    logger = RunLogger(folder, total_iterations=9, enabled=True, resumed_iteration=resumed, wandb=own)
    logger.log(3, {"loss/lm": 2.0})
    logger.close()
    return wandb.calls


def test_wandb_is_told_every_iteration_and_a_run_that_goes_on_is_the_same_one(tmp_path, monkeypatch):
    (init, define, log, finish) = logged_to_wandb(tmp_path, monkeypatch)
    assert init[2]["project"] == "distil" and init[2]["name"] == tmp_path.name and init[2]["config"] == {"lr": 1e-3}
    assert define == ("define_metric", ("*",), {"step_metric": "iteration"})
    assert log == ("log", ({"iteration": 3, "loss/lm": 2.0},), {}) and finish[0] == "finish"
    known = init[2]["id"]
    assert logged_to_wandb(tmp_path, monkeypatch, resumed=2)[0][2]["id"] == known
    assert logged_to_wandb(tmp_path, monkeypatch)[0][2]["id"] != known, "a run that begins anew is another"


def test_without_wandb_or_an_account_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--wandb-project distil: wandb is not installed; pip install wandb, or leave it out"):
        check_installed("distil")
    check_installed("")
    wandb = StandIn()

    def refuse(**_):
        raise wandb.Error("api_key not configured (no-tty)")

    wandb.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match=r"--wandb-project distil: api_key not configured \(no-tty\); run `wandb login`, set WANDB_MODE=offline"):
        WandbRun(tmp_path, "distil", "", {}, continued=False)


def test_the_real_wandb_writes_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    own = WandbRun(tmp_path, "distil", "first", {"lr": 1e-3}, continued=False)
    own.log(1, {"loss/lm": 2.0})
    own.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    until = time.monotonic() + 30  # its own process writes the file
    while b"loss/lm" not in file.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"loss/lm" in file.read_bytes()


def test_a_run_without_metrics_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"metrics.jsonl holds no iteration; give the --save folder of a run that has started"):
        plot_training(tmp_path)


def test_flops_are_those_torch_counts_but_for_the_causal_half_of_attention():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    sizes = TransformerSizes(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=8,
        vocab_size=96,
        gated=True,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, 24, dtype=torch.long))
    attention = 3 * 2 * 24 * 32  # the half of the scores that a causal mask throws away
    assert counter.get_total_flops() / (2 * 24) == forward_flops_per_token(sizes, 24) + attention
    assert forward_flops_per_token(sizes, 24) - forward_flops_per_token(sizes, 24, with_head=False) == 2 * 32 * 96


def test_the_peak_is_known_for_the_gpus_of_the_table_only():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA GeForce RTX 3090") is None


def test_a_part_of_an_iteration_ends_when_the_gpu_has_done_its_work(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append("synchronize"))
    stopwatch = Stopwatch()
    with stopwatch("rollout"):
        waited.append("work")
    assert waited == ["synchronize", "work", "synchronize"]
    assert list(stopwatch.take()) == ["time/rollout"] and stopwatch.take() == {}, "seconds are those since the last look"
