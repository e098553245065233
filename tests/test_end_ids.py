"""Where an answer ends: what `generate` of transformers takes, for rollouts, files of answers, scores, and the export."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from tasks import make_rows
from test_generation import EagerStep
from test_trainer import command, run
from tiny import tiny_config, tiny_model
from train_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM

from megakd.checkpointing.export_hf import export_to_hf
from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.training import save_checkpoint
from megakd.config import EvaluateConfig, GenerateConfig, ResponseConfig
from megakd.data.end_ids import EndIds, end_ids
from megakd.data.sft_dataset import SFTDataset
from megakd.data.tokenizer import check_same_tokenizer, load_tokenizer
from megakd.evaluation.evaluator import evaluate
from megakd.generation import rows
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.generation.write_responses import write_responses
from megakd.models.model_provider import build_model, padded_vocab_size

NEW = 24
GREEDY = Sampling(max_new_tokens=NEW, greedy=True)
ABSENT = object()


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """student/ and teacher/ with one tokenizer whose eos_token is 0, and rows to train on."""
    lab = tmp_path_factory.mktemp("ends")
    rows = make_rows(40, seed=3)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    for seed, name in enumerate(("student", "teacher")):
        model = tiny_model(tiny_config("gpt2", layers=2, vocab_size=len(tokenizer)), seed=seed)
        model.transformer.wpe.weight.data *= 20  # the next token hangs on its place: answers of many tokens
        model.save_pretrained(lab / name)
        tokenizer.save_pretrained(lab / name)
    for name, part in {"train": rows[:32], "valid": rows[32:]}.items():
        lines = [json.dumps({"prompt": row["prompt"], "response": row["response"]}) for row in part]
        (lab / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return lab


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def prompts(lab: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(lab / "teacher")
    return [tokenizer(row["prompt"])["input_ids"] for row in read(lab / "valid.jsonl")]


def by_transformers(folder: Path, prompts) -> list[list[int]]:
    """What `generate` writes on the folder as it is, prompt by prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 1}
    one = lambda ids: model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **settings)[0]
    return [one(ids)[len(ids) :].tolist() for ids in prompts]


@pytest.fixture(scope="module")
def spoken(lab) -> list[int]:
    """Three ids that the student writes in the middle of its answers, none of them the tokenizer's eos_token."""
    configured(lab, "endless", {}, None)
    responses = by_transformers(lab / "endless", prompts(lab))
    assert all(len(response) == NEW for response in responses)
    openings = {token for response in responses for token in (0, response[0])}
    found = list(dict.fromkeys(token for response in responses for token in response if token not in openings))
    assert len(found) >= 3
    return found[:3]


def configured(lab: Path, name: str, generation, config, of: str = "student") -> Path:
    """A copy of a model whose two configs name these ends; without a generation_config.json where that is ABSENT."""
    folder = shutil.copytree(lab / of, lab / name, dirs_exist_ok=True)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"eos_token_id": config}))
    (folder / "generation_config.json").unlink()
    if generation is not ABSENT:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def up_to_the_end(response: list[int], stop) -> list[int]:
    return response[: next((i + 1 for i, token in enumerate(response) if token in stop), len(response))]


LAYOUTS = {  # of three ids that the model writes: what generation_config.json and config.json say, what stops, what is taught
    "one id": (lambda a, b, c: ({"eos_token_id": a}, a, (a,), a)),
    "three, as Llama 3": (lambda a, b, c: ({"eos_token_id": [a, b, c]}, b, (a, b, c), a)),
    "three with the tokenizer's": (lambda a, b, c: ({"eos_token_id": [a, 0, b]}, b, (a, 0, b), 0)),
    "config.json alone": (lambda a, b, c: (ABSENT, a, (a,), a)),
    "a list in config.json": (lambda a, b, c: (ABSENT, [a, b], (a, b), a)),
    "the generation config comes first": (lambda a, b, c: ({"eos_token_id": a}, b, (a,), a)),
    "a generation config without": (lambda a, b, c: ({"temperature": 0.7, "do_sample": True}, a, (a,), a)),
    "in the tokenizer only": (lambda a, b, c: ({}, None, (0,), 0)),
    "no token of the tokenizer": (lambda a, b, c: ({"eos_token_id": -1}, 50256, (0,), 0)),
}
NAMES_NONE = ("a generation config without", "in the tokenizer only", "no token of the tokenizer")  # generate would not end


def decide_write_and_save(layout, folders: dict[str, Path], given) -> dict:
    """By layout: the decision, what we write with it, and the export of a checkpoint that says it."""
    found = {}
    for name, folder in folders.items():
        source, ends = ModelFolder.open(folder), end_ids(folder, load_tokenizer(folder))
        model = build_model(source.config, layout, padded_vocab_size=padded_vocab_size([source.config.vocab_size], 1))
        source.load_into(model)
        written = generate(model, given, range(len(given)), GREEDY, eos_id=ends.stop)
        save_checkpoint(folder / "native", 1, model=model, source=source, ends=ends)
        export_to_hf(folder / "native", folder / "hf")
        found[name] = ends, written
    return found


def test_generate_on_the_export_ends_where_ours_does(lab, spoken):
    expected = {name: layout(*spoken) for name, layout in LAYOUTS.items()}
    folders = {name: configured(lab, name, *want[:2]) for name, want in expected.items()}
    endless = by_transformers(lab / "endless", prompts(lab))
    (found,) = run_distributed(decide_write_and_save, 1, folders, prompts(lab))
    for name, (ends, written) in found.items():
        stop, taught = expected[name][2:]
        assert ends == EndIds(stop, taught), name
        assert load_tokenizer(folders[name]).eos_token_id == taught
        assert written == [up_to_the_end(response, stop) for response in endless], name
        assert by_transformers(folders[name] / "hf", prompts(lab)) == written, name
        if name not in NAMES_NONE:
            assert by_transformers(folders[name], prompts(lab)) == written, name
        for file in ("generation_config.json", "config.json"):  # no byte changes where generate was right
            before, after = folders[name] / file, folders[name] / "hf" / file
            same = before.is_file() == after.is_file() and (not before.is_file() or before.read_bytes() == after.read_bytes())
            assert same or (name in NAMES_NONE and file == "generation_config.json"), (name, file)
    assert min(len(response) for response in found["three, as Llama 3"][1]) < NEW


def test_the_end_that_generate_takes_is_the_one_that_is_learnt(lab, spoken, capfd):
    """The tokenizer says 0, both configs another id: teaching 0 would leave an export that runs to its limit."""
    folder = configured(lab, "configs agree", {"eos_token_id": spoken[0]}, spoken[0])
    data = SFTDataset(lab / "train.jsonl", load_tokenizer(folder), max_length=40, max_prompt_length=24)
    assert {sample.response[-1] for sample in data} == {spoken[0]}
    flags = {"model": folder, "max-length": 40, "max-prompt-length": 24, "train-iters": 2, "lr": "1e-6"}
    run_distributed(run, 1, command(lab, "taught", "sft", **flags))
    token = load_tokenizer(folder).convert_ids_to_tokens(spoken[0])
    assert f"note: responses end with {token!r} ({spoken[0]})\n" in capfd.readouterr().err
    assert json.loads((lab / "taught" / "hf" / "generation_config.json").read_text())["eos_token_id"] == spoken[0]


def test_what_a_run_writes_ends_at_the_ends_of_student_and_teacher(lab, spoken, capfd):
    """SeqKD learns the teacher's end, and the student's export then ends there, too."""
    written = by_transformers(configured(lab, "endless teacher", {}, None, of="teacher"), prompts(lab))
    theirs = next(token for token in written[0][2:] if token not in (0, spoken[0]))
    student = configured(lab, "base", {"eos_token_id": spoken[0]}, spoken[0])
    teacher = configured(lab, "chat", {"eos_token_id": [theirs]}, theirs, of="teacher")
    check_same_tokenizer(load_tokenizer(student), load_tokenizer(teacher))
    lengths = {"max-length": 24 + NEW, "max-prompt-length": 24, "max-new-tokens": NEW, "train-iters": 2}
    flags = {"model": student, "teacher-model": teacher, "train-data": lab / "valid.jsonl", "save-rollouts": True, "top-k": 1}
    run_distributed(run, 1, command(lab, "both", "seqkd", **flags, **lengths))
    ended = [row["response"][-1] for row in read(lab / "both" / "rollouts.jsonl") if len(row["response"]) < NEW]
    assert theirs in ended and set(ended) <= {theirs, spoken[0]}
    assert "written ones also with" in capfd.readouterr().err
    export = json.loads((lab / "both" / "hf" / "generation_config.json").read_text())
    assert export["eos_token_id"] == [spoken[0], theirs]


def test_answers_and_their_lengths_stop_at_each_end(lab, spoken, tmp_path):
    """An end is no part of the answer, whichever it is, be it a special token or not."""
    folder = configured(lab, "scored", {"eos_token_id": spoken}, spoken[0])
    written = by_transformers(folder, prompts(lab))
    tokenizer = load_tokenizer(folder)
    said = [response[:-1] if response[-1] in spoken else response for response in written]
    assert len({response[-1] for response in written}) > 1 and any(map(len, said))
    responses = ResponseConfig(max_prompt_length=24, max_new_tokens=NEW, greedy=True)
    config = {"model": str(folder), "dtype": "fp32", "responses": responses}
    scores = EvaluateConfig(**config, data=(f"valid={lab / 'valid.jsonl'}",), save=str(tmp_path / "scores"))
    run_distributed(on_rank, 1, evaluate, scores)
    results = json.loads((tmp_path / "scores" / "results.json").read_text())
    rows = read(tmp_path / "scores" / "answers.jsonl")
    assert [row["response_ids"] for row in rows] == written
    assert [row["answer"] for row in rows] == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
    assert results["sets"]["valid"]["response_length"] == sum(map(len, said)) / len(said)
    assert results["ends"]["student"] == {"stop": spoken, "taught": spoken[0]}

    run_distributed(on_rank, 1, write_responses, GenerateConfig(**config, data=str(lab / "valid.jsonl"), save=str(tmp_path / "a.jsonl")))
    assert [row["response"] for row in read(tmp_path / "a.jsonl")] == [tokenizer.decode(ids) for ids in said]


def on_rank(layout, run, config):
    return run(config)


def test_the_step_of_fixed_shape_stops_at_each_end(lab, spoken, monkeypatch):
    """What a GPU captures, run without capture."""

    def check(layout):
        source = ModelFolder.open(lab / "endless")
        model = build_model(source.config, layout, padded_vocab_size=padded_vocab_size([source.config.vocab_size], 1))
        source.load_into(model)
        write = partial(generate, model, prompts(lab), range(len(prompts(lab))), GREEDY, eos_id=spoken)
        plain = write()
        monkeypatch.setattr(rows, "is_capturable", lambda device, sampling: True)
        monkeypatch.setattr(rows, "CapturedStep", EagerStep)
        assert write() == plain
        return plain

    (written,) = run_distributed(check, 1)
    assert {response[-1] for response in written if len(response) < NEW} <= set(spoken)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"eos_token_id": "</s>"}', r'generation_config.json: eos_token_id is "</s>"; write the id of a token, or a list of ids'),
        ('{"eos_token_id": [1, true]}', r"generation_config.json: eos_token_id is \[1, true\]; write"),
        ("[1]", "generation_config.json: holds no JSON object"),
        ('{"eos_token', r"generation_config.json: not JSON \(.*; copy or download it again"),
    ],
)
def test_ends_that_are_none_are_refused_with_their_file(lab, value, message):
    folder = configured(lab, "damaged", {}, None)
    (folder / "generation_config.json").write_text(value)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(folder)
