"""A number that is none: no step is taken on it, nothing of it is saved, and what it came from is named."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file, save_file
from test_trainer import command, inputs, run  # noqa: F401
from transformers import AutoTokenizer

from megakd import trainer
from megakd.errors import UserError
from megakd.reporting.jsonl import read_jsonl

HUGE = 1e30  # finite, and its square is not: the next layer norm makes NaN of it


@pytest.fixture(scope="module")
def poisoned(inputs):  # noqa: F811
    """Models with a huge weight in the first layer, or at a position that the longest rows alone reach."""
    for name, weight, rows in (("layer", "transformer.h.0.mlp.c_proj.weight", slice(None)), ("position", "transformer.wpe.weight", far(inputs))):
        shutil.copytree(inputs / "student", inputs / f"huge-{name}")
        change(inputs / f"huge-{name}", weight, rows)
    return inputs


def far(root) -> int:
    """The last input position of the third longest of the rows that are learnt."""
    tokenizer = AutoTokenizer.from_pretrained(root / "student")
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    pairs = [[len(tokenizer(row[name])["input_ids"]) for name in ("prompt", "response")] for row in rows]
    return sorted(min(prompt + response, 15) for prompt, response in pairs if prompt <= 10)[-3] - 1


def change(folder, name, rows) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = name if name in tensors else name.removeprefix("transformer.")
    tensors[name][rows] = HUGE
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def stops(layout, arguments):
    with pytest.raises(UserError) as error:
        run(layout, arguments)
    return str(error.value)


LAYOUTS = {"dp2": {}, "tp2": {"tp": 2}, "pp2": {"pp": 2, "micro-batch-size": 4}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layer_is_named_and_no_step_is_taken(poisoned, layout):
    flags = LAYOUTS[layout] | {"model": poisoned / "huge-layer", "train-iters": 1, "valid-data": ""}
    said = run_distributed(stops, 2, command(poisoned, f"layer-{layout}", "sft", **flags))[0]
    rank = 1 if layout == "pp2" else 0
    assert f"iteration 1: loss/lm is nan; first student: hidden state behind layer 2, on rank {rank}, micro-batch 0, sample ids " in said
    file = poisoned / f"layer-{layout}" / "fault" / "iteration_0000001.json"
    assert said.endswith(
        f"; no step was taken, {file} has its rows; lower --lr, or use --dtype fp32 to see whether precision is the reason, "
        "or leave such steps out with --on-nonfinite skip"
    )
    fault = json.loads(file.read_text())
    ids = said.split("sample ids ")[1].split(";")[0]
    assert ", ".join(str(row["sample_id"]) for row in fault["rows"]) == ids and fault["config"]["method"] == "sft"
    assert not (poisoned / f"layer-{layout}" / "hf").exists() and not (poisoned / f"layer-{layout}" / "checkpoints").exists()


def test_of_several_rows_those_with_the_fault_are_named_and_their_steps_left_out(poisoned):
    """One row a micro-batch. Steps without such a row are taken, and nothing of the others is left in the weights."""
    flags = {"model": poisoned / "huge-position", "micro-batch-size": 1, "global-batch-size": 2, "train-iters": 8, "tp": 2}
    flags |= {"on-nonfinite": "skip", "valid-data": ""}
    run_distributed(run, 2, command(poisoned, "token", "sft", **flags))
    rows = {row["iteration"]: row for row in read_jsonl(poisoned / "token" / "metrics.jsonl") if "left_out" in row or "loss/lm" in row}
    left_out = [iteration for iteration, row in rows.items() if row.get("left_out")]
    assert 0 < len(left_out) < 8 and list(rows) == list(range(1, 9))
    for iteration in left_out:
        fault = json.loads((poisoned / "token" / "fault" / f"iteration_{iteration:07d}.json").read_text())
        assert "student: hidden state behind layer 1" in fault["first"] and len(fault["rows"]) == 1
    assert all(tensor.isfinite().all() for tensor in load_file(poisoned / "token" / "hf" / "model.safetensors").values())


def held_out_is_nan(layout, arguments):
    trainer.valid_losses = lambda method, samples: {"valid/lm_loss": float("nan")}
    run(layout, arguments)


def test_a_held_out_number_that_is_none_is_told(poisoned, capfd):
    run_distributed(held_out_is_nan, 1, command(poisoned, "held-out", "sft", **{"train-iters": 1}))
    told = [line for line in capfd.readouterr().err.splitlines() if "held-out data" in line]
    assert told == [f"note: iteration {iteration}: valid/lm_loss is nan, of the held-out data" for iteration in (0, 1)]


def test_steps_that_are_left_out_leave_every_weight_as_it_was(poisoned):
    flags = {"model": poisoned / "huge-layer", "train-iters": 2, "on-nonfinite": "skip", "valid-data": ""}
    run_distributed(run, 1, command(poisoned, "unmoved", "sft", **flags))
    before, after = (load_file(poisoned / folder / "model.safetensors") for folder in ("huge-layer", "unmoved/hf"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method, found", [
    ("kd", r"loss/total is nan; first teacher: hidden state behind layer 2, on rank 0"),
    ("promptkd", r"is nan; first teacher: hidden state behind layer 2, on rank 0"),
    ("seqkd", r"the next token of sample \d+, after \d+ of its prompt and 0 of its response, cannot be chosen: its logits are NaN or infinite"),
])  # fmt: skip
def test_a_teacher_that_says_nothing_finite_is_named(poisoned, method, found):
    flags = {"teacher-model": poisoned / "huge-layer", "train-iters": 1}
    said = run_distributed(stops, 1, command(poisoned, f"teacher-{method}", method, **flags))[0]
    assert re.search(found, said), said
    assert not (poisoned / f"teacher-{method}" / "hf").exists()


NAME = "decoder.layers.0.mlp.linear_fc1.weight"


def a_gradient_overflows(layout, arguments):
    build = trainer.Trainer._build_method

    def with_overflow(self):
        method = build(self)
        dict(method.student.named_parameters())[NAME].register_hook(lambda gradient: gradient * float("inf"))
        return method

    trainer.Trainer._build_method = with_overflow
    return stops(layout, arguments)


def test_a_gradient_is_named_where_every_loss_is_finite(poisoned):
    said = run_distributed(a_gradient_overflows, 2, command(poisoned, "gradient", "sft", tp=2))[0]
    assert f"iteration 1: grad_norm is nan; first student: gradient of {NAME}, on rank 0; no step was taken" in said


def learns_too_fast(layout, arguments):
    finite = trainer.all_finite
    trainer.all_finite = lambda model: [p.data.fill_(float("inf")) for p in list(model.parameters())[:1]] and finite(model)
    return stops(layout, arguments)


def test_weights_that_are_no_numbers_are_not_saved(poisoned):
    said = run_distributed(learns_too_fast, 1, command(poisoned, "fast", "sft"))[0]
    assert said.startswith("iteration 2: the student's weights are NaN or infinite, and are not saved; lower --lr")
    assert not (poisoned / "fast" / "checkpoints").exists()
