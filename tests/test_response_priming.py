"""Response priming: the direction of its KL, its temperature, the paper's values, and what its settings ask of the data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from megakd_kernels import VocabShard
from test_trainer import command, inputs, run  # noqa: F401  a fixture

from megakd.config import from_flags, from_yaml, parse
from megakd.data.batch import collate_unshifted
from megakd.dry_run import FirstReplica
from megakd.losses.distillation import priming_loss
from megakd.losses.token_loss import HeadRows
from megakd.run_data import RunData
from megakd.trainer import open_checked

CONFIGS = Path(__file__).parents[1] / "configs" / "response-priming"
ALONE = VocabShard(2)


def rows(*probabilities: float) -> HeadRows:
    """One position whose distribution is this, through an output layer that changes nothing."""
    return HeadRows(torch.tensor([probabilities]).log(), torch.eye(2))


def losses(q, p, *, alpha=0.25, temperature=1.0):
    return {name: value.item() for name, value in priming_loss(q, p, torch.tensor([1]), ALONE, alpha=alpha, temperature=temperature).logs.items()}


def test_the_distance_is_the_students_from_the_teacher():
    """KL(a‖b) = Σ a log(a/b): of a student at (0.9, 0.1) and a teacher at (0.5, 0.5), and not the other way round."""
    found = losses(rows(0.9, 0.1), rows(0.5, 0.5))
    kl = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    other = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert found["loss/reverse_kl"] == pytest.approx(kl, rel=1e-5) and abs(kl - other) > 0.1
    assert found["loss/total"] == pytest.approx(0.25 * -math.log(0.1) + 0.75 * kl, rel=1e-5)


def test_both_are_softened_and_the_distance_counts_by_the_square():
    found = losses(rows(0.9, 0.1), rows(0.5, 0.5), temperature=2.0)
    q = 1 / (1 + math.sqrt(0.1 / 0.9))  # softmax(log 0.9 / 2, log 0.1 / 2)
    kl = q * math.log(q / 0.5) + (1 - q) * math.log((1 - q) / 0.5)
    assert found["loss/lm"] == pytest.approx(-math.log(0.1), rel=1e-5), "cross-entropy is at temperature 1"
    assert found["loss/reverse_kl"] == pytest.approx(kl, rel=1e-5)
    assert found["loss/total"] == pytest.approx(0.25 * -math.log(0.1) + 0.75 * 4 * kl, rel=1e-5)


@pytest.mark.parametrize("priming", ["none", "teacher", "ground-truth", "confidence"])
def test_the_papers_values_are_in_its_files(priming):
    config = from_yaml(CONFIGS / f"{priming}.yaml")
    from_flags(["--model", "m", "--teacher-model", "t", "--train-data", "d", "--save", "s"], config).check()
    training, data, own, lora = config.training, config.data, config.response_priming, config.lora
    assert (lora.rank, lora.lora_alpha, lora.lora_dropout) == (4, 8.0, 0.1)
    assert lora.lora_target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (config.method, config.conditioning.priming) == ("response_priming", priming)
    assert (training.optimizer, training.lr, training.momentum, training.weight_decay) == ("sgd", 5e-6, 0.9, 1e-2)
    assert (training.micro_batch_size, training.global_batch_size, training.epochs, training.lr_decay_style) == (1, 1, 2, "cosine")
    assert (data.max_length, data.max_prompt_length) == (512, 256)
    assert (own.priming_alpha, own.priming_temperature, own.priming_objective) == (0.6093348343631224, 5.942267335064758, "aligned")


def test_the_published_objective_is_told_for_what_it_is(capsys):
    words = ["--method", "response_priming", "--model", "m", "--teacher-model", "t", "--train-data", "d", "--save", "s", "--train-iters", "1"]
    parse(words)
    assert capsys.readouterr().err == ""
    parse([*words, "--priming-objective", "original"])
    assert capsys.readouterr().err.startswith("note: --priming-objective original compares each place of the question with the answer's token")


def test_a_loss_on_prompts_needs_one_in_every_row(inputs, tmp_path):  # noqa: F811
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "one two three four"}\n' * 8)
    flags = {"train-data": text, "train-iters": 1}
    for objective in ("aligned", "original"):
        words = command(inputs, objective, "response_priming", **flags, **{"priming-objective": objective})
        if objective == "aligned":
            run_distributed(run, 1, words)
        else:
            line = "has no prompt, which --method response_priming needs; give data with prompts, or --priming-objective aligned"
            with pytest.raises(AssertionError, match=line):
                run_distributed(run, 1, words)


@pytest.mark.parametrize("objective", ["aligned", "original"])
def test_a_row_is_shown_with_the_places_that_the_objective_compares(objective, inputs, capsys):  # noqa: F811
    flags = {"priming-objective": objective, "teacher-priming": "Think.", "dry-run": True, "show-data": 1, "max-length": 14}
    config = parse(command(inputs, objective, "response_priming", **flags))
    folders = open_checked(config)
    data = RunData.open(config, folders, FirstReplica(1))
    data.show(1, config, folders.student.tokenizer)
    (sample, *_), decode = data.loader.dataset, lambda ids: folders.student.tokenizer.decode(ids, skip_special_tokens=False)
    shown = capsys.readouterr().out.replace("\n    | ", "\n")
    if objective == "aligned":
        assert f"⟦{decode(sample.response)}⟧" in shown and "their labels" not in shown
        return
    batch = collate_unshifted([sample])
    learnt = batch.labels[0].tolist()
    places = len(learnt)
    for name, ids in (("student", batch.tokens[0]), ("teacher", batch.teacher_batch.tokens[0])):
        assert f"the {name} reads {places} tokens:\n⟦{decode(ids.tolist()[:places])}⟧\n" in shown
    assert shown.endswith(f"their labels are {places} tokens:\n{decode(learnt)}\n")
