"""--deterministic-mode: what it switches on, for how long, and that it changes nothing on a CPU."""

from __future__ import annotations

import os

import pytest
import torch
from distributed import run_distributed
from test_trainer import command, inputs, numbers  # noqa: F401
from tiny import tiny_config

from megakd import trainer
from megakd.config import parse
from megakd.errors import UserError
from megakd.generation.sampling import keep_top_p
from megakd.models.model_provider import build_model
from megakd.runtime.deterministic import VARIABLES, deterministic_mode


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # noted, so that it is put back
        monkeypatch.delenv(name)


def switches() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory


def test_switches_are_on_while_the_run_lasts_and_an_error_ends_that():
    before = switches()
    with pytest.raises(ZeroDivisionError), deterministic_mode(True):
        assert switches() == (True, False)
        assert {name: os.environ[name] for name in VARIABLES} == {name: values[0] for name, values in VARIABLES.items()}
        raise ZeroDivisionError
    assert switches() == before != (True, False)


def test_without_the_flag_the_callers_own_choice_stays():
    torch.use_deterministic_algorithms(True)
    try:
        with deterministic_mode(False):
            assert torch.are_deterministic_algorithms_enabled() and not os.environ.keys() & VARIABLES.keys()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name, value", [("CUBLAS_WORKSPACE_CONFIG", ":4096:2"), ("NCCL_ALGO", "Tree"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")])
def test_an_environment_that_promises_nothing_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error, deterministic_mode(True):
        pass
    assert str(error.value) == f"--deterministic-mode: {name} is {value} in the environment; unset it, or use {' or '.join(VARIABLES[name])}"
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv(name, VARIABLES[name][-1])
    with deterministic_mode(True):
        assert os.environ[name] == VARIABLES[name][-1]


def switches_of_a_run(layout, arguments):
    """What a run's models and its environment said while it was under way."""
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    seen = []
    options = trainer.student_options

    def noted(config):
        seen.append((*switches(), os.environ.get("NCCL_ALGO")))
        return options(config)

    trainer.student_options = noted
    trainer.train(parse(arguments))
    return seen[:1], switches()


def test_a_run_has_them_and_the_same_numbers_on_a_cpu(inputs):  # noqa: F811
    flagged = [*command(inputs, "flagged", "promptkd"), "--deterministic"]
    assert run_distributed(switches_of_a_run, 2, flagged, tp=2) == [([(True, False, "Ring")], (False, True))] * 2
    assert run_distributed(switches_of_a_run, 2, command(inputs, "plain", "promptkd"), tp=2) == [([(False, True, None)], (False, True))] * 2
    assert numbers(inputs / "flagged") == numbers(inputs / "plain")


def embeddings_way(layout):
    model = lambda: build_model(tiny_config("gpt2"), layout, padded_vocab_size=128, dtype=torch.float32)
    with deterministic_mode(True):
        inside = model()
    return [one.embedding.word_embeddings.deterministic_mode for one in (inside, model())]


def test_megatrons_embedding_takes_its_deterministic_way_back():
    assert run_distributed(embeddings_way, 1) == [[True, False]]


def test_top_p_sums_whole_numbers():
    """As sums of float64 would, wherever the boundary is no rounding."""
    z = torch.randn(64, 500, generator=torch.Generator().manual_seed(0)) * 3
    for p in (0.1, 0.5, 0.9, 0.99):
        ordered, ids = z.double().sort(-1, descending=True)
        share = ordered.softmax(-1)
        before = share.cumsum(-1) - share
        kept = torch.zeros_like(z, dtype=torch.bool).scatter_(1, ids, before < p)
        clear = ((before - p).abs() > 1e-6).all(-1)
        assert clear.sum() > 48
        assert torch.equal(keep_top_p(z, p).isfinite()[clear], kept[clear])


def test_the_likeliest_token_stays_however_small_p_is():
    z = torch.tensor([[1.0, 3.0, 2.0]])
    for p in (1e-9, 1e-17, 5e-324):  # the last two are less than half of a unit
        assert keep_top_p(z, p).isfinite().tolist() == [[False, True, False]]
