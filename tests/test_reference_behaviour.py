"""What the reference does otherwise: off by default, and each brought back by its name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_distributed
from test_methods import ENDS, PAIRS, TOTAL_ITERS, method_inputs, oracle, run_config, samples

from megakd.config import TrainingConfig
from megakd.losses.policy_gradient import whiten
from megakd.methods import METHODS
from megakd.methods import rollout as rollout_module
from megakd.optimizer import learning_rate
from megakd.trainer import total_iterations

ROOT = Path(__file__).parents[1]


def with_compat(config, *compat):
    return replace(config, training=replace(config.training, reference_behaviour=compat))


def test_all_means_every_one_and_a_name_its_own_alone():
    asked = lambda *names: vars(TrainingConfig(reference_behaviour=names).reference_compat)
    assert all(asked("all").values()) and not any(asked().values())
    names = re.findall(r"\| `([a-z][a-z-]+)`[^|]*\|$", (ROOT / "docs" / "fidelity.md").read_text(), re.MULTILINE)
    assert {name.replace("-", "_") for name in names} == asked().keys(), "the table of docs/fidelity.md names them all"
    for name in names:
        assert asked(name) == asked() | {name.replace("-", "_"): True}


def test_warm_up_begins_above_zero_and_the_reference_at_zero():
    settings = {"lr": 1.0, "total_iters": 10}
    ours = TrainingConfig(lr_warmup_iters=4, lr_decay_style="constant")
    theirs = replace(ours, reference_behaviour=("zero-lr-start",))
    assert [learning_rate(i, config=ours, **settings) for i in (1, 4, 5)] == [0.25, 1.0, 1.0]
    assert [learning_rate(i, config=theirs, **settings) for i in (1, 4, 5)] == [0.0, 0.75, 1.0]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_without_warm_up_the_reference_begins_at_the_highest_rate(style):
    config = TrainingConfig(lr_decay_style=style, reference_behaviour=("all",))
    assert learning_rate(1, lr=1.0, total_iters=10, config=config) == pytest.approx(1.0)


@pytest.mark.parametrize("style, values", [("linear", [1.0, 0.55, 0.2125]), ("cosine", [1.0, 0.55, 0.134254])])
def test_decay_begins_at_the_top_and_every_iteration_moves(style, values):
    config = TrainingConfig(min_lr=0.1, lr_decay_style=style, lr_warmup_iters=2)
    assert [learning_rate(i, lr=1.0, total_iters=10, config=config) for i in (3, 7, 10)] == pytest.approx(values, abs=1e-6)


def test_the_last_step_is_lost_only_where_gradients_accumulate():
    loader = SimpleNamespace(iterations_per_epoch=7)
    config = with_compat(run_config("sft", 4, {}), "lost-last-step")
    config = replace(config, training=replace(config.training, epochs=2))
    assert [total_iterations(config, loader, dp_size=dp) for dp in (1, 2)] == [13, 14]


def check_mean_of_means(layout):
    """Rows of very unequal length: the two means differ, and each equals its own float64 formula."""
    pair, rows = PAIRS["gpt2"], sorted(samples(), key=lambda s: -s.num_positions)

    def trained(rows, *compat):
        config = with_compat(run_config("sft", 2, {}), *compat)
        return METHODS["sft"](method_inputs(layout, config, pair), config, total_iters=TOTAL_ITERS).train(rows, 1)["loss/lm"]

    values = {compat: trained(rows, *compat) for compat in ((), ("mean-of-means",))}
    reference = oracle(pair)
    nll = [reference.nll(s.prompt, s.response).detach() for s in rows]
    pairs_of_rows = [torch.cat(nll[i : i + 2]) for i in range(0, 8, 2)]
    assert values[()] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-6)
    assert values[("mean-of-means",)] == pytest.approx(torch.stack([x.mean() for x in pairs_of_rows]).mean().item(), rel=1e-6)
    assert abs(values[()] - values[("mean-of-means",)]) > 1e-4
    unanswered = [*rows[:6], *(replace(row, response=()) for row in rows[6:])]  # as an answer of nothing that was cut off
    nothing = torch.stack([*(x.mean() for x in pairs_of_rows[:3]), torch.tensor(0.0)]).mean().item()
    assert trained(unanswered, "mean-of-means") == pytest.approx(nothing, rel=1e-6)


def test_the_mean_over_tokens_is_no_mean_of_means():
    run_distributed(check_mean_of_means, 1)


def decays(layout, family, compat):
    config = with_compat(run_config("sft", 4, {}), *compat)
    optimizer = method_inputs(layout, config, (PAIRS[family][0], PAIRS[family][0])).optimizer
    groups = optimizer.optimizer.param_groups
    return sorted(sum(p.ndim == 1 for p in group["params"]) for group in groups if group["wd_mult"])


@pytest.mark.parametrize("family, norms_decayed", [("llama", True), ("opt", True), ("gpt2", False)])
def test_norms_are_kept_from_decay_and_the_reference_decays_those_it_does_not_name(family, norms_decayed):
    assert run_distributed(decays, 1, family, ()) == [[0]]
    (theirs,) = run_distributed(decays, 1, family, ("decay-norms",))
    assert (theirs[0] > 0) == norms_decayed


def test_a_response_cut_at_the_limit_keeps_its_tokens_and_the_reference_ends_it(monkeypatch):
    monkeypatch.setattr(rollout_module, "generate", lambda *_, **__: [[5] * 12, [5, 0]])
    config = run_config("promptkd", 4, {})
    written = lambda config: [s.response for s in rollout_module.rollout(None, samples()[:2], config, ENDS, 1)]
    assert written(config) == [(5,) * 12, (5, 0)]
    assert written(with_compat(config, "forced-eos")) == [(5,) * 11 + (0,), (5, 0)]


def check_initial_prompt(layout, compat):
    encode = lambda text, add_special_tokens: [1, 11, 12] if add_special_tokens else [11, 12]
    config = with_compat(run_config("promptkd", 4, {}), *compat)
    parts = replace(method_inputs(layout, config, PAIRS["llama"]), tokenizer=SimpleNamespace(encode=encode))
    method = METHODS["promptkd"](parts, config, total_iters=TOTAL_ITERS)
    words = method.teacher.model.embedding.word_embeddings.weight
    expected = [1, 11, 12, 1, 11, 12, 1] if compat else [11, 12, 11, 12, 11, 12, 11]
    assert torch.equal(method.learner.soft_prompt, words[expected])


@pytest.mark.parametrize("compat", [(), ("special-tokens-in-prompt",)])
def test_the_prompt_starts_from_its_text_repeated_without_special_tokens(compat):
    run_distributed(check_initial_prompt, 1, compat)


def check_teacher_dropout(layout):
    """With dropout the prompt's loss differs from the one without; the teacher is back in evaluation mode either way."""
    losses = {}
    teacher = {"family": "gpt2", "layers": 2, "resid_pdrop": 0.3, "embd_pdrop": 0.3}
    for compat in ((), ("teacher-dropout",)):
        config = with_compat(run_config("promptkd", 4, {}), *compat)
        method = METHODS["promptkd"](method_inputs(layout, config, (PAIRS["gpt2"][0], teacher)), config, total_iters=TOTAL_ITERS)
        losses[compat] = method.train(samples(), 1)["loss/prompt_kd"]
        assert not method.teacher.model.training
    assert abs(losses[()] - losses[("teacher-dropout",)]) > 1e-3


def test_the_teacher_has_no_dropout_while_the_prompt_learns():
    run_distributed(check_teacher_dropout, 1)


def test_whitening_counts_real_tokens_and_the_reference_padding_too():
    values, mask = torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert whiten(values, mask)[0].tolist() == pytest.approx([-1.224745, 0.0, 1.224745, 0.0], abs=1e-5)
    padded = whiten(values, mask, count=4)[0]
    mean, deviation = 6 / 4, (14 / 4 - (6 / 4) ** 2) ** 0.5
    assert padded.tolist() == pytest.approx([(v - mean) / deviation for v in (1, 2, 3)] + [0.0], abs=1e-5)
