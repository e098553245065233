"""Answers scored while a run learns, and the student of its best evaluation."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from rouge_score.rouge_scorer import RougeScorer
from test_reporting import StandIn
from test_trainer import command, numbers, run
from tiny import tiny_folder
from train_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.checkpointing import best as best_students
from megakd.checkpointing.best import BestStudent, kept_best
from megakd.checkpointing.export_hf import export_to_hf
from megakd.config import Config, from_flags
from megakd.errors import UserError
from megakd.reporting.jsonl import read_jsonl

SCORED = {"eval-answers": True, "keep-best": "rouge_l", "eval-interval": 1, "save-interval": 1, "train-iters": 5, "lr": "0.02"}


WORDS = ("one", "two", "three", "four")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A student and a teacher, and answers of a few words, which a student has partly right soon."""
    root = tmp_path_factory.mktemp("best")
    rng = random.Random(0)
    rows = [{"prompt": f"Say {i % 4}:", "response": " " + " ".join(rng.choices(WORDS, (4, 3, 2, 1), k=3))} for i in range(48)]
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(root / name, "gpt2", layers=2, vocab_size=len(tokenizer), seed=seed, embd_pdrop=0.1)
        tokenizer.save_pretrained(root / name)
    for name, part in {"train": rows[:32], "valid": rows[32:]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


@pytest.fixture(scope="module")
def scored(inputs) -> Path:
    """A run that scores and keeps, at TP 2."""
    run_distributed(run, 2, command(inputs, "scored", "sft", **SCORED), tp=2)
    return inputs / "scored"


def evaluations(folder: Path, name: str = "valid/rouge_l") -> dict[int, float]:
    return {row["iteration"]: row[name] for row in read_jsonl(folder / "metrics.jsonl") if name in row}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def greedy_scores(folder: Path, rows: list[dict], new_tokens: int) -> tuple[float, float]:
    """Rouge-L and the mean number of tokens without an end, by transformers, one row at a time, with the papers' scorer."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    scorer, total, tokens, ended = RougeScorer(["rougeL"], use_stemmer=True), 0.0, 0, 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        written = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        answer = tokenizer.decode(written, skip_special_tokens=True).strip()
        total += scorer.score(row["response"], answer)["rougeL"].fmeasure
        has_end = int(written[-1] == tokenizer.eos_token_id)
        tokens, ended = tokens + len(written) - has_end, ended + has_end
    assert ended, "some answers have an end"
    return 100 * total / len(rows), tokens / len(rows)


def test_the_best_student_is_that_of_the_highest_score_and_has_it(inputs, scored):
    found = evaluations(scored)
    assert sorted(found) == list(range(6)) and len(set(found.values())) > 2, "there is something to choose"
    after = {iteration: value for iteration, value in found.items() if iteration}
    winner = max(after, key=after.get)
    report = json.loads((scored / "best" / "megakd_export.json").read_text())
    assert (report["iteration"], report["best"]) == (winner, {"metric": "valid/rouge_l", "value": after[winner]})
    export_to_hf(scored / "checkpoints", scored.parent / "again", iteration=winner)
    assert same(scored / "best", scored.parent / "again")
    rows = [json.loads(line) for line in (inputs / "valid.jsonl").read_text().splitlines()]
    rouge, length = greedy_scores(scored / "best", rows, 6)
    assert rouge == pytest.approx(after[winner], abs=1e-6)
    assert length == evaluations(scored, "valid/response_length")[winner]
    assert not (scored / best_students.NATIVE).exists()


def test_a_loss_is_best_where_it_is_lowest(inputs):
    run_distributed(run, 1, command(inputs, "loss", "sft", **SCORED | {"keep-best": "valid/lm_loss", "lr": "0.05"}))
    after = {iteration: value for iteration, value in evaluations(inputs / "loss", "valid/lm_loss").items() if iteration}
    winner = min(after, key=after.get)
    assert kept_best(inputs / "loss") == {"metric": "valid/lm_loss", "value": after[winner]}
    assert winner < 5, "with this learning rate the last is not the best"


def test_of_equal_numbers_the_first_stays_and_what_is_none_is_never_best(tmp_path):
    best = BestStudent(tmp_path, "valid/rouge_l", lower_is_better=False)
    beaten = [best.beaten_by({"valid/rouge_l": value}) for value in (float("nan"), 1.0, 1.0, 2.0, 1.5)]
    assert beaten == [False, True, False, True, False]


def test_sampled_scores_are_the_same_at_every_layout(inputs):
    flags = {**SCORED, "train-iters": 1, "eval-decoding": "sample", "hidden-dropout": 0}
    found = []
    for name, (ranks, tp, pp) in {"whole": (1, 1, 1), "pipeline": (2, 1, 2), "replicas": (2, 1, 1)}.items():
        sizes = {"tp": tp, "pp": pp}
        run_distributed(run, ranks, command(inputs, name, "sft", **flags, **sizes), **sizes)
        found.append(list(evaluations(inputs / name).values()))
    assert found[0] == found[1] == found[2]


def test_sampled_answers_depend_on_the_seed_and_are_not_the_greedy_ones(inputs, scored):
    flags, found = {**SCORED, "train-iters": 1, "model": scored / "best"}, []
    for name, more in {"a": {"seed": 1}, "b": {"seed": 2}, "c": {"seed": 1, "eval-decoding": "greedy"}}.items():
        run_distributed(run, 1, command(inputs, f"seed-{name}", "sft", **flags | {"eval-decoding": "sample"} | more))
        found.append(evaluations(inputs / f"seed-{name}")[0])  # before training: the same student
    assert len(set(found)) == 3


def test_a_run_cut_off_and_continued_keeps_the_same_best(inputs, scored):
    flags = SCORED | {"save-interval": 3}
    run_distributed(run, 2, command(inputs, "broken", "sft", **flags), 5, tp=2)  # iterations 1 to 4, the last checkpoint after 3
    run_distributed(run, 2, command(inputs, "broken", "sft", **flags), tp=2)
    assert kept_best(inputs / "broken") == kept_best(scored) and same(inputs / "broken" / "best", scored / "best")
    assert [row for row in numbers(inputs / "broken") if "valid/rouge_l" in row] == [row for row in numbers(scored) if "valid/rouge_l" in row]


def test_what_was_to_be_beaten_is_remembered(inputs, scored, tmp_path):
    """It is read from the folder, for another metric it means nothing."""
    winner = kept_best(scored)["value"]
    again = lambda metric: BestStudent(scored, metric, lower_is_better=False)
    assert not again("valid/rouge_l").beaten_by({"valid/rouge_l": winner}) and again("valid/exact_match").beaten_by({"valid/exact_match": 0.0})


def test_a_best_student_without_a_checkpoint_is_kept_by_the_same_run_alone(inputs):
    flags = SCORED | {"save-interval": 5}
    run_distributed(run, 1, command(inputs, "early", "sft", **flags), 3)  # iterations 1 and 2, and no checkpoint
    kept = kept_best(inputs / "early")
    assert kept and not list((inputs / "early" / "checkpoints").glob("iter_*"))
    with pytest.raises(AssertionError, match=r"--lr 0.5 differs from the 0.02 of the run in --save"):
        run_distributed(run, 1, command(inputs, "early", "sft", **flags | {"lr": "0.5"}))
    assert kept_best(inputs / "early") == kept
    run_distributed(run, 1, command(inputs, "early", "sft", **flags))
    after = {iteration: value for iteration, value in evaluations(inputs / "early").items() if iteration}
    assert kept_best(inputs / "early")["value"] == max(after.values())


def test_a_teacher_with_ranks_of_its_own_waits_for_the_export(inputs):
    flags = {**SCORED, "train-iters": 2, "teacher-ranks": 1, "keep-best": "valid/reverse_kl"}
    run_distributed(run, 2, command(inputs, "apart", "kd", **flags))
    assert kept_best(inputs / "apart")["metric"] == "valid/reverse_kl" and (inputs / "apart" / "best" / "model.safetensors").is_file()


def test_adapters_are_kept_as_they_are_exported(inputs):
    flags = {**SCORED, "train-iters": 1, "lora-rank": 2}
    run_distributed(run, 1, command(inputs, "adapters", "sft", **flags))
    assert (inputs / "adapters" / "best" / "adapter_model.safetensors").is_file() and kept_best(inputs / "adapters")


def test_the_newest_checkpoints_are_kept(inputs):
    run_distributed(run, 1, command(inputs, "few", "sft", **{"train-iters": 5, "save-interval": 1, "eval-interval": 5, "keep-last": 2}))
    left = sorted(path.name for path in (inputs / "few" / "checkpoints").iterdir())
    assert left == ["iter_0000004", "iter_0000005", "latest_checkpointed_iteration.txt"]


def test_rows_of_gsm8k_are_scored_by_their_number(inputs, tmp_path):
    lines = [json.loads(line) for line in (inputs / "valid.jsonl").read_text().splitlines()]
    for i, row in enumerate(lines[:4]):
        row["response"] += f" #### {i}"
    (inputs / "gsm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    flags = {**SCORED, "train-iters": 1, "valid-data": inputs / "gsm.jsonl", "keep-best": "gsm8k_strict"}
    with pytest.raises(AssertionError, match=r"--gsm8k-rule robust give valid/exact_match, valid/gsm8k_robust, valid/rouge_l; use one"):
        run_distributed(run, 1, command(inputs, "gsm", "sft", **flags))
    run_distributed(run, 1, command(inputs, "gsm", "sft", **flags, **{"gsm8k-rule": "papers"}))
    found = read_jsonl(inputs / "gsm" / "metrics.jsonl")[0]
    assert {"valid/gsm8k_strict", "valid/gsm8k_flexible"} <= found.keys() and found["valid/gsm8k_flexible"] in (0, 25, 50, 75, 100)
    assert kept_best(inputs / "gsm")["metric"] == "valid/gsm8k_strict"


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"keep-best": "rougeL"}, r"--keep-best rougeL: no evaluation has this number; use one of valid/lm_loss, valid/reverse_kl, valid/rouge_l"),
        ({"keep-best": "rouge_l"}, r"--keep-best rouge_l is a score of answers; give --eval-answers, or use valid/lm_loss"),
        ({"keep-best": "reverse_kl"}, r"--keep-best reverse_kl compares with a teacher, which --method sft has not; use valid/lm_loss"),
        ({"keep-best": "lm_loss", "valid-data": ""}, r"--keep-best lm_loss is a number of --valid-data; give one, or leave it out"),
    ],
)
def test_what_cannot_be_kept_is_told(inputs, flags, message):
    with pytest.raises(UserError, match=message):
        from_flags(command(inputs, "refused", "sft", **flags), Config()).check()


def told_to_wandb(layout, arguments: list[str]) -> list:
    wandb = StandIn()
    sys.modules["wandb"] = wandb
    run(layout, arguments)
    return wandb.calls


def test_a_run_tells_wandb_what_it_logs(inputs):
    flags = {"train-iters": 2, "eval-interval": 2, "wandb-project": "distil", "wandb-name": "first", "valid-data": inputs / "valid.jsonl"}
    told, nothing = run_distributed(told_to_wandb, 2, command(inputs, "told", "sft", **flags), tp=2)
    assert told[0][0] == "init" and (told[0][2]["project"], told[0][2]["name"]) == ("distil", "first") and not nothing, "rank 0 alone"
    logged = [words[0] for name, words, _ in told if name == "log"]
    assert logged == read_jsonl(inputs / "told" / "metrics.jsonl")
