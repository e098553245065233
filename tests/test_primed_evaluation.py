"""Held-out distances and exposure bias with a teacher that reads another text: those of float64 transformers, and of a whole command."""

from __future__ import annotations

import json

import pytest
import torch
from distributed import run_distributed
from oracle import Oracle
from stories import PAIRS, pair_of_models, primed_batch, rows
from test_methods import CONSTANT, method_inputs, run_config
from test_trainer import inputs  # noqa: F401  a fixture

from megakd.config import parse
from megakd.config.evaluate import EvaluateConfig
from megakd.evaluation.evaluator import evaluate
from megakd.evaluation.exposure_bias import token_divergences
from megakd.evaluation.held_out import held_out_losses
from megakd.generation.answers import Writer
from megakd.methods import METHODS
from megakd.teachers.live import LiveStudent


def measured(layout, parallel):
    config = run_config("kd", 2, parallel)
    parts = method_inputs(layout, config, PAIRS["gpt2"])
    method = METHODS["kd"](parts, config, total_iters=1)
    losses = held_out_losses(method.student, method.teacher, samples=primed_batch(0), micro_batch_size=3)
    curves = token_divergences(LiveStudent(method.student), method.teacher, primed_batch(0), micro_batch_size=3)
    return losses, [curve.tolist() for curve in curves]


@pytest.mark.parametrize("tp, pp, dp", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_distances_of_a_primed_teacher_equal_float64_transformers(tp, pp, dp):
    oracle = Oracle(*pair_of_models(PAIRS["gpt2"]), CONSTANT)
    expected, total, tokens = [], 0.0, 0
    with torch.no_grad():
        for x, y, z in rows(primed_batch(0)):
            log_q, log_p = oracle.log_q(x, y), oracle.log_p(z, y)
            expected.append((log_p.exp() * (log_p - log_q)).sum(-1).tolist())
            total, tokens = total + (log_q.exp() * (log_q - log_p)).sum().item(), tokens + len(y)
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    for losses, curves in run_distributed(measured, tp * pp * dp, parallel, tp=tp, pp=pp):
        for curve, wanted in zip(curves, expected, strict=True):
            assert curve == pytest.approx(wanted, rel=2e-5, abs=1e-6)
        assert losses["reverse_kl"] == pytest.approx(total / tokens, rel=1e-5)
        assert losses["forward_kl"] == pytest.approx(sum(map(sum, expected)) / tokens, rel=1e-5)


def evaluated(layout, words):
    """Prompts that were asked, all of a set together, in any order."""
    asked, answer = set(), Writer.answer

    def noted(self, samples, sampling):
        asked.add(tuple(tuple(sample.prompt) for sample in samples))
        return answer(self, samples, sampling)

    Writer.answer = noted
    evaluate(parse(list(map(str, words)), EvaluateConfig))
    return asked


def len_of_all(prompts) -> int:
    return sum(map(len, prompts))


def test_a_model_is_compared_with_itself_primed(inputs, tmp_path):  # noqa: F811
    """With the same text it is as near as can be, with another it is not; and the primed one writes what it is asked."""
    words = ["--model", inputs / "student", "--teacher-model", "self", "--data", f"test={inputs / 'valid.jsonl'}", "--seeds", 1]
    words += ["--max-prompt-length", 12, "--max-new-tokens", 6, "--exposure-bias"]
    found = {}
    for name, priming in {"same": "none", "primed": "Think first."}.items():
        save = tmp_path / name
        (asked,) = run_distributed(evaluated, 1, [*words, "--teacher-priming", priming, "--save", save])
        shorter, longer = min(asked, key=len_of_all), max(asked, key=len_of_all)
        assert all((len(theirs) > len(ours)) == (priming != "none") for ours, theirs in zip(shorter, longer, strict=True))
        results = json.loads((save / "results.json").read_text())
        found[name] = results["sets"]["test"]["reverse_kl"], results["exposure_bias"]["test"]["l_eps"][-1]
        assert results["config"]["teacher_priming"] == priming
    assert found["same"] == (0.0, 0.0) and min(found["primed"]) > 1e-3


def test_priming_without_a_teacher_to_compare_with_is_told(capsys):
    parse(["--model", "m", "--data", "d", "--teacher-priming", "teacher"], EvaluateConfig)
    assert "--teacher-priming teacher has no effect without --teacher-model" in capsys.readouterr().err


def test_a_store_takes_a_priming_and_refuses_what_asks_for_a_model(capsys):
    words = ["--model", "m", "--data", "d", "--teacher-cache", "c", "--teacher-model", "t"]
    parse([*words, "--teacher-priming", "teacher"], EvaluateConfig)
    assert "no effect" not in capsys.readouterr().err
    wrong = {"--exposure-bias": "--exposure-bias reads what was written, and --teacher-cache has the responses of the data alone",
             "--teacher-tp=2": "--teacher-tensor-model-parallel-size 2 is of a model, and --teacher-cache loads none"}  # fmt: skip
    for flag, line in wrong.items():
        with pytest.raises(SystemExit):
            parse([*words, flag], EvaluateConfig)
        assert line in capsys.readouterr().err
