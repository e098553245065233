"""Several teachers, each for its own rows: together they are the runs on the parts, at every layout."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from stories import PAIRS
from tasks import make_rows
from test_methods import StateDictSource, method_inputs, run_config, samples
from test_trainer import numbers, without_figures
from tiny import tiny_config, tiny_folder, tiny_model
from train_tokenizer import train_tokenizer
from transformers import AutoTokenizer

import megakd
from megakd import trainer
from megakd.config import parse
from megakd.data.batch import micro_batches
from megakd.data.dataloader import split_across_dp
from megakd.data.sft_dataset import SFTDataset
from megakd.errors import UserError
from megakd.loading import align_vocabularies, frozen
from megakd.methods import METHODS
from megakd.models.model_provider import build_model, load_weights
from megakd.teachers.live import LiveTeacher
from megakd.teachers.several import SeveralTeachers

TEACHERS = ("code", "math")


def method_of(layout, config, teacher):
    """KD of a student with two teachers; of one of them, or of both by their names."""
    inputs, spec = method_inputs(layout, config, PAIRS["llama"]), tiny_config(**PAIRS["llama"][1])
    other = build_model(spec, layout, **align_vocabularies([tiny_config(**s).vocab_size for s in PAIRS["llama"]], layout.tp_size))
    load_weights(other, StateDictSource(tiny_model(spec, seed=5)))
    teachers = {"code": inputs.teacher, "math": LiveTeacher(frozen(other))}
    inputs.teacher = SeveralTeachers(teachers) if teacher is None else teachers[teacher]
    return METHODS["kd"](inputs, config, total_iters=10)


def gradient(layout, parallel, teacher):
    """What an iteration logs, and the gradient it steps along, on the rows of a teacher or on all."""
    config = run_config("kd", 3, parallel)
    config = replace(config, distillation=replace(config.distillation, kd_ratio=1.0))
    method = method_of(layout, config, teacher)
    method.optimizer.step = lambda iteration: {"grad_norm": 0.0, "lr": 0.0}
    rows = [replace(sample, teacher=TEACHERS[sample.sample_id % 3 == 0]) for sample in samples()]
    rows = [row for row in rows if teacher in (None, row.teacher)]
    logged = method.train(split_across_dp(rows, layout.dp_size)[layout.dp_rank], 1)
    return logged, {name: p.main_grad.clone() for name, p in method.student.named_parameters()}


def check_parts(layout, parallel):
    (code, of_code), (math, of_math), (both, of_both) = (gradient(layout, parallel, teacher) for teacher in (*TEACHERS, None))
    assert both["tokens"] == code["tokens"] + math["tokens"] and min(code["tokens"], math["tokens"]) > 5
    mean = lambda of_code, of_math: (of_code * code["tokens"] + of_math * math["tokens"]) / both["tokens"]
    assert both["loss/total"] == pytest.approx(mean(code["loss/total"], math["loss/total"]), rel=1e-6)
    assert abs(code["loss/total"] - math["loss/total"]) > 1e-3
    for name, whole in of_both.items():
        torch.testing.assert_close(whole, mean(of_code[name], of_math[name]), rtol=1e-5, atol=1e-6)
    return both["loss/total"]


@pytest.mark.parametrize("ranks, layout", [(1, {}), (2, {"tp": 2}), (2, {"pp": 2})])
def test_two_routed_teachers_equal_two_runs_on_the_parts(ranks, layout):
    parallel = {"tensor_model_parallel_size": layout.get("tp", 1), "pipeline_model_parallel_size": layout.get("pp", 1)}
    run_distributed(check_parts, ranks, parallel, **layout)


def test_a_micro_batch_has_one_teacher():
    rows = [replace(sample, teacher=TEACHERS[i % 2]) for i, sample in enumerate(samples())]
    batches = micro_batches(rows, 8)
    assert [batch.teacher for batch in batches] == sorted(batch.teacher for batch in batches)
    assert all({sample.teacher for sample in batch.samples} == {batch.teacher} for batch in batches)
    assert sorted(sample.sample_id for batch in batches for sample in batch.samples) == sorted(row.sample_id for row in rows)


# ---- from the command line


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("several")
    rows = make_rows(24, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    for seed, name in enumerate(("student", "math", "code")):
        tiny_folder(root / name, "gpt2", layers=2, vocab_size=len(tokenizer) + seed, seed=seed)
        tokenizer.save_pretrained(root / name)
    rows = [{"prompt": row["prompt"], "response": row["response"], "kind": TEACHERS[i % 3 == 0]} for i, row in enumerate(rows)]
    for name, part in {"train": rows[:16], "valid": rows[16:]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def command(root: Path, save: str, *more) -> list[str]:
    words = ["--method", "kd", "--model", root / "student", "--teacher-model", f"math={root / 'math'}", f"code={root / 'code'}", "--teacher-field",
             "kind", "--train-data", root / "train.jsonl", "--valid-data", root / "valid.jsonl", "--max-length", 32, "--max-prompt-length", 24,
             "--train-iters", 2, "--micro-batch-size", 2, "--global-batch-size", 8, "--lr", "1e-2", "--save", root / save, *more]  # fmt: skip
    return [str(word) for word in words]


def train(layout, arguments):
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    without_figures()
    trainer.train(parse(arguments))


def test_a_run_with_two_teachers_is_the_same_on_replicas_and_evaluates_each_row_with_its_own(inputs):
    run_distributed(train, 1, command(inputs, "alone"))
    run_distributed(train, 2, command(inputs, "replicas"))
    for ours, theirs in zip(numbers(inputs / "replicas"), numbers(inputs / "alone"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5)
    for name in TEACHERS:
        file = inputs / f"{name}.jsonl"
        file.write_text("".join(line for line in (inputs / "valid.jsonl").open() if f'"{name}"' in line))
        flags = ["--train-iters", 1, "--teacher-model", inputs / name, "--teacher-field", "", "--valid-data", file]
        run_distributed(train, 1, command(inputs, f"only-{name}", *flags))
    tokenizer = AutoTokenizer.from_pretrained(inputs / "student")
    rows = {name: SFTDataset(inputs / f"{name}.jsonl", tokenizer, max_length=32, max_prompt_length=24) for name in TEACHERS}
    tokens = [sum(rows[name][i].num_labels for i in range(len(rows[name]))) for name in TEACHERS]
    parts = [numbers(inputs / f"only-{name}")[0]["valid/reverse_kl"] for name in TEACHERS]
    whole = numbers(inputs / "alone")[0]["valid/reverse_kl"]
    assert whole == pytest.approx(sum(n * part for n, part in zip(tokens, parts)) / sum(tokens), rel=1e-5)
    assert abs(parts[0] - parts[1]) > 1e-3


@pytest.mark.parametrize(
    "ranks, flags", [(2, ["--teacher-tp", 2]), (2, ["--tp", 2, "--teacher-tp", 1]), (4, ["--pp", 2, "--teacher-tp", 2, "--teacher-pp", 2])], ids=str
)
def test_several_in_a_layout_of_their_own_teach_the_same(inputs, ranks, flags):
    """Replicas of the student have unlike numbers of either's rows, and every rank has a part in each pass."""
    save = "apart-" + "".join(map(str, flags))
    run_distributed(train, 1, command(inputs, f"{save}-alone"))
    run_distributed(train, ranks, command(inputs, save, *flags))
    for ours, theirs in zip(numbers(inputs / save), numbers(inputs / f"{save}-alone"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=1e-5)


def test_a_template_gives_each_teacher_its_own_text(inputs):
    """The row names its teacher, and a template has the row."""
    template = inputs / "own.jinja"
    template.write_text("{% if row.kind == 'math' %}Count. {% endif %}{{ question }}")
    run_distributed(train, 1, command(inputs, "own-text", "--teacher-priming", template))
    for name in TEACHERS:
        for part in ("train", "valid"):
            rows = [line for line in (inputs / f"{part}.jsonl").open() if json.loads(line)["kind"] == name]
            (inputs / f"{part}-{name}.jsonl").write_text("".join(rows))
    held_out = {}
    for name, text in (("math", ["--teacher-priming", "Count. "]), ("code", [])):
        flags = ["--train-iters", 1, "--global-batch-size", 2, "--teacher-model", inputs / name, "--teacher-field", "", *text]
        run_distributed(train, 1, command(inputs, f"own-text-{name}", *flags, "--train-data", inputs / f"train-{name}.jsonl", "--valid-data", inputs / f"valid-{name}.jsonl"))
        held_out[name] = numbers(inputs / f"own-text-{name}")[0]["valid/reverse_kl"]
    tokenizer = AutoTokenizer.from_pretrained(inputs / "student")
    rows = {name: SFTDataset(inputs / f"valid-{name}.jsonl", tokenizer, max_length=32, max_prompt_length=24) for name in TEACHERS}
    tokens = {name: sum(found[i].num_labels for i in range(len(found))) for name, found in rows.items()}
    whole = sum(tokens[name] * held_out[name] for name in TEACHERS) / sum(tokens.values())
    assert numbers(inputs / "own-text")[0]["valid/reverse_kl"] == pytest.approx(whole, rel=1e-5)
    run_distributed(train, 1, command(inputs, "no-text"))
    assert abs(numbers(inputs / "no-text")[0]["valid/reverse_kl"] - whole) > 1e-4


def refused(root, *more):
    def check(layout, arguments):
        with pytest.raises(UserError) as found:
            train(layout, arguments)
        return str(found.value)

    return run_distributed(check, 1, command(root, "refused", *more))[0]


def test_a_row_without_a_teacher_is_refused_by_its_place(inputs, tmp_path):
    rows = (inputs / "train.jsonl").read_text().splitlines()
    for line, said in ((rows[4].replace('"kind": "', '"kind": "un'), 'field kind is "un'), (rows[4].replace("kind", "sort"), "has no field kind")):
        (tmp_path / "train.jsonl").write_text("\n".join([*rows[:4], line, *rows[5:]]) + "\n")
        message = refused(inputs, "--train-data", tmp_path / "train.jsonl")
        assert f"{tmp_path / 'train.jsonl'} line 5: {said}" in message and "--teacher-field names one of the teachers math, code" in message


def test_a_primed_row_has_to_fit_the_teacher_with_the_fewest_positions(inputs, tmp_path):
    long, words = tmp_path / "long", "think " * 12
    tokenizer = AutoTokenizer.from_pretrained(inputs / "code")
    tiny_folder(long, "gpt2", layers=2, vocab_size=len(tokenizer) + 2, n_positions=256)
    tokenizer.save_pretrained(long)
    for models in ((f"math={long}", f"code={inputs / 'code'}"), (f"math={inputs / 'math'}", f"code={long}")):
        assert "more than the 64 positions that it has for both" in refused(inputs, "--teacher-model", *models, "--teacher-priming", words)


def test_a_field_that_is_no_name_is_told(inputs, tmp_path):
    row = json.loads((inputs / "train.jsonl").read_text().splitlines()[0])
    (tmp_path / "odd.jsonl").write_text(json.dumps(row | {"kind": ["math"]}) + "\n")
    assert "line 1: field kind is" in refused(inputs, "--train-data", tmp_path / "odd.jsonl")


def test_teachers_of_another_tokenizer_or_template_are_refused(inputs, tmp_path):
    (tmp_path / "other").mkdir()
    for file in (inputs / "code").iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    said = refused(inputs, "--teacher-model", f"math={inputs / 'math'}", f"code={tmp_path / 'other'}")
    assert "have different chat templates" in said


FLAGS = "--model m --train-data d --save s --train-iters 1 "


@pytest.mark.parametrize(
    "words, line",
    [
        ("--method kd --teacher-model math=a b --teacher-field f", "--teacher-model b is one of several and has no name"),
        ("--method kd --teacher-model math=a math=b --teacher-field f", "gives one name twice"),
        ("--method kd --teacher-model math=a code=b", "--teacher-model has the teachers math, code; say with --teacher-field"),
        ("--method kd --teacher-model a --teacher-field f", "--teacher-field f chooses among several teachers"),
        ("--method promptkd --teacher-model math=a code=b --teacher-field f", "trains a soft prompt in front of the teacher, which several"),
        ("--method minillm --teacher-mixed-alpha 0 --teacher-model math=a code=b --teacher-field f", "keeps the teacher's hidden states"),
        ("--method seqkd --teacher-model math=a code=b --teacher-field f", "lets the teacher write the responses"),
        ("--method kd --teacher-model math=a code=b --teacher-field f --hidden-coef 1", "--hidden-coef matches the layers of one teacher"),
        ("--method kd --teacher-model math=a code=b --teacher-field f --teacher-ranks 1", "--teacher-ranks 1 are one teacher's"),
        ("--method kd --teacher-model t --teacher-quantize int8 --teacher-ranks 1", "--teacher-quantize int8 is for a teacher that stays with"),
        ("--method kd --teacher-cache c --teacher-offload", "--teacher-offload is of a model, and --teacher-cache loads none"),
        ("--method kd --teacher-model self --teacher-ema 0.9 --teacher-quantize int8", "--teacher-quantize int8 freezes the weights that --teacher-ema"),
        ("--method kd --teacher-model math=a code=b --teacher-field f --teacher-cache c", "--teacher-cache holds the targets of one teacher"),
    ],
)
def test_what_several_teachers_cannot_do_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit):
        parse((FLAGS + words).split())
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_from_python_teachers_are_a_mapping(inputs):
    run_distributed(train, 1, command(inputs, "by-flags"))

    def call(layout):
        teachers = {name: inputs / name for name in TEACHERS}
        flags = {"max_length": 32, "max_prompt_length": 24, "train_iters": 2, "micro_batch_size": 2, "global_batch_size": 8, "lr": 1e-2}
        data = {"train_data": inputs / "train.jsonl", "valid_data": inputs / "valid.jsonl"}
        megakd.distill(method="kd", student=inputs / "student", teacher=teachers, teacher_field="kind", save=inputs / "by-call", **data, **flags)

    run_distributed(call, 1)
    assert numbers(inputs / "by-call") == numbers(inputs / "by-flags")
