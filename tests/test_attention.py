"""Where heads look: entropy and mass on numbers are those of an independent float64 computation, of the right tokens and queries."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_folder, tiny_model
from train_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM

from megakd.config import AttentionConfig
from megakd.data.batch import Sample
from megakd.errors import UserError
from megakd.evaluation import attention
from megakd.evaluation.attention_report import change

ROOT = Path(__file__).parents[1]
FAMILIES = ("gpt2", "opt", "llama", "qwen2", "mistral")
ROWS = [
    {"question": "Tom has 7 eggs and 12 pens. How many?", "answer": "7 + 12 = 19\n#### 19"},
    {"question": "Ann buys 1,234.50 pens, then 3.", "answer": "#### 5"},
    {"question": "Who is it?", "answer": "#### 1"},  # no number: passed over
    {"question": "5?", "answer": "5 = 5\n#### 5"},
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    """A tiny model of every family, with one tokenizer; llama-student is another llama; questions.jsonl."""
    lab = tmp_path_factory.mktemp("lab")
    tokenizer = train_tokenizer(["Question 0: " + row["question"] + row["answer"] for row in ROWS], vocab_size=300)
    for name, seed in (*((family, 7) for family in FAMILIES), ("llama-student", 8)):
        family = name.removesuffix("-student")
        positions = {"n_positions" if family == "gpt2" else "max_position_embeddings": 128}
        tokenizer.save_pretrained(tiny_folder(lab / name, family, layers=3, vocab_size=len(tokenizer), seed=seed, **positions))
    (lab / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (lab / "template.jinja").write_text("Question 0: {{ instruction }}\n")
    return lab


def settings(lab: Path, *names: str, **changes) -> AttentionConfig:
    words = tuple(f"{name}={lab / name}" for name in names)
    usual = {"data": str(lab / "questions.jsonl"), "prompt_template": str(lab / "template.jinja"), "batch_size": 2, "dtype": "fp32"}
    return AttentionConfig(**{"model": words, **usual, **changes})


# ---- an independent computation


def rotated(x, base: float):
    """Rotary positions: pairs (i, i + d/2) turned by position / base^(2i/d). x is [S, H, d]."""
    positions, _, width = x.shape
    angle = torch.arange(positions).double()[:, None] / base ** (torch.arange(0, width, 2).double() / width)
    cos, sin = (torch.cat([part, part], -1)[:, None] for part in (angle.cos(), angle.sin()))
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def queries_and_keys(model, family: str, layer: int, hidden_SE):
    """[S, H, d] each, from what goes into the layer; biases, norms, grouped heads and rotations done by hand."""
    hf, heads = model.config, model.config.num_attention_heads
    if family == "gpt2":
        block = model.transformer.h[layer]
        q, k, _ = (block.ln_1(hidden_SE) @ block.attn.c_attn.weight + block.attn.c_attn.bias).chunk(3, -1)
    elif family == "opt":
        block = model.model.decoder.layers[layer]
        normed = block.self_attn_layer_norm(hidden_SE)
        q, k = block.self_attn.q_proj(normed), block.self_attn.k_proj(normed)
    else:
        block = model.model.layers[layer]
        normed = hidden_SE * (hidden_SE.square().mean(-1, keepdim=True) + hf.rms_norm_eps).rsqrt() * block.input_layernorm.weight
        q, k = block.self_attn.q_proj(normed), block.self_attn.k_proj(normed)
    q, k = q.unflatten(-1, (heads, -1)), k.unflatten(-1, (getattr(hf, "num_key_value_heads", None) or heads, -1))
    if family not in ("gpt2", "opt"):
        q, k = (rotated(x, hf.rope_parameters["rope_theta"]) for x in (q, k))
    return q, k.repeat_interleave(heads // k.shape[1], 1)


def by_hand(folder: Path, family: str, reading: attention.Reading):
    """Entropy and mass [L, H] in float64, from the hidden states that go into each layer, term by term."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa").eval()
    with torch.no_grad():
        states = model(torch.tensor([reading.tokens]), output_hidden_states=True).hidden_states
        layers = [queries_and_keys(model, family, layer, states[layer][0]) for layer in range(model.config.num_hidden_layers)]
    entropy, mass = np.zeros((2, len(layers), model.config.num_attention_heads))
    for layer, (q, k) in enumerate(layers):
        for head in range(q.shape[1]):
            for query in reading.queries:
                scores = [math.exp(q[query, head] @ k[key, head] / math.sqrt(q.shape[-1])) for key in range(query + 1)]
                a = [score / sum(scores) for score in scores]
                entropy[layer, head] -= sum(p * math.log(p) for p in a if p) / len(reading.queries)
                mass[layer, head] += sum(p for key, p in enumerate(a) if key in reading.numbers) / len(reading.queries)
    return entropy, mass


@pytest.mark.parametrize("queries", ["question", "answer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_entropy_and_mass_equal_an_independent_float64_computation(lab, family, queries):
    config = settings(lab, family, queries=queries)
    readings = attention.read_questions(config, attention.open_models(attention.named_paths(config.model))[0].tokenizer)
    found = attention.measure(str(lab / family), readings, config)
    assert len(readings) == 3 and found.entropy_NLH.shape == (3, 3, 4)
    for n, reading in enumerate(readings):
        entropy, mass = by_hand(lab / family, family, reading)
        np.testing.assert_allclose(found.entropy_NLH[n], entropy, atol=1e-5)
        np.testing.assert_allclose(found.mass_NLH[n], mass, atol=1e-6)
    assert found.mass_NLH.min() > 0.001 and np.ptp(found.mass_NLH) > 0.01  # something was compared


def test_equal_attention_has_the_logarithm_of_its_keys_and_the_share_of_the_numbers(lab):
    """All queries zero: query q looks at q + 1 keys alike."""
    model = tiny_model(AutoModelForCausalLM.from_pretrained(lab / "llama").config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    reading = attention.Reading(tokens=tuple(range(1, 9)), queries=(3, 6), numbers=(0, 5))
    with torch.no_grad():
        ((entropy, mass),) = attention.statistics_of(model, [reading])
    assert np.allclose(entropy, (math.log(4) + math.log(7)) / 2) and np.allclose(mass, (1 / 4 + 2 / 7) / 2)


def test_no_result_depends_on_the_batch(lab):
    config = settings(lab, "llama")
    readings = attention.read_questions(config, attention.open_models(attention.named_paths(config.model))[0].tokenizer)
    one, all_at_once = (attention.measure(str(lab / "llama"), readings, settings(lab, "llama", batch_size=size)) for size in (1, 8))
    np.testing.assert_allclose(one.entropy_NLH, all_at_once.entropy_NLH, atol=1e-6)
    np.testing.assert_allclose(one.mass_NLH, all_at_once.mass_NLH, atol=1e-6)


# ---- which tokens


def read(lab: Path, **changes) -> tuple[list[attention.Reading], list[list[str]]]:
    """What is read of the questions, and the text of each one's number tokens."""
    config = settings(lab, "llama", **changes)
    tokenizer = attention.open_models(attention.named_paths(config.model))[0].tokenizer
    readings = attention.read_questions(config, tokenizer)
    return readings, [[tokenizer.decode(reading.tokens[i]) for i in reading.numbers] for reading in readings]


def test_numbers_are_those_of_the_question_and_not_of_the_template_or_the_answer(lab):
    for queries in ("question", "answer"):
        readings, texts = read(lab, queries=queries)
        assert ["".join(text).replace(" ", "") for text in texts] == ["712", "1,234.503", "5"]
        assert len(readings) == 3  # the question without a number is passed over


def test_queries_are_the_question_or_what_predicts_the_answer(lab):
    tokenizer = attention.open_models(attention.named_paths(settings(lab, "llama").model))[0].tokenizer
    (question, *_), _ = read(lab, queries="question")
    assert tokenizer.decode([question.tokens[i] for i in question.queries]).strip() == ROWS[0]["question"]
    (answer, *_), _ = read(lab, queries="answer")
    prompt = len(question.tokens)
    assert answer.tokens[:prompt] == question.tokens and tokenizer.decode(answer.tokens[prompt:]) == ROWS[0]["answer"]
    assert answer.queries == tuple(range(prompt - 1, len(answer.tokens)))  # the last one predicts the end


def test_samples_are_the_first_questions(lab):
    assert len(read(lab, samples=2)[0]) == 2


@pytest.mark.parametrize(
    ("prompt", "fields", "span"),
    [
        ("In 2024: Add 3\nA:", {"instruction": "Add 3", "question": "Add 3"}, "Add 3"),
        ("<user>Add 3<end>", {"messages": [{"role": "user", "content": "Add 3"}, {"role": "assistant", "content": "4"}]}, "Add 3"),
        ("Add 3 to 4", {"prompt": "Add 3 to 4"}, "Add 3 to 4"),
        ("ADD 3", {"question": "Add 3"}, "ADD 3"),  # a template that changes the text: all of it
    ],
)
def test_the_question_is_found_in_the_rendered_prompt(prompt, fields, span):
    first, end = attention.question_span(prompt, fields)
    assert prompt[first:end] == span


def test_a_token_counts_where_it_shares_a_character_with_a_number():
    sample, spans = Sample(0, (1, 2, 3, 4), ()), [(0, 3), (3, 6), (6, 7), (7, 9)]  # "has $12 3." as has/ $1/2/ 3 ...
    assert attention.reading_of(sample, spans, "has $12 3", 0, 9).numbers == (1, 2, 3)
    assert attention.reading_of(sample, spans, "has $12 3", 7, 9).numbers == (3,)


# ---- the comparison


def test_heads_are_listed_by_how_much_their_mass_rose_with_the_error_over_questions():
    rng = np.random.default_rng(0)
    base, student = (attention.HeadStatistics(rng.random((5, 2, 3)), rng.random((5, 2, 3))) for _ in range(2))
    found = change(base, student, most=4)
    differences = (student.mass_NLH - base.mass_NLH).mean(0)
    assert [head["change"] for head in found["heads"]] == pytest.approx(sorted(differences.flatten(), reverse=True)[:4])
    for head in found["heads"]:
        one = (student.mass_NLH - base.mass_NLH)[:, head["layer"], head["head"]]
        assert head["student"] - head["base"] == pytest.approx(head["change"]) == pytest.approx(one.mean())
        assert head["sem"] == pytest.approx(np.sqrt(((one - one.mean()) ** 2).sum() / 4 / 5))
    assert found["entropy"]["mean"] == pytest.approx((student.entropy_NLH - base.entropy_NLH).mean())


def test_the_command_writes_maps_figures_and_changes(lab, tmp_path, capsys):
    config = settings(lab, "llama", "llama-student", save=str(tmp_path / "out"), heads=2)
    results = attention.analyze_attention(config)
    assert json.loads((tmp_path / "out" / "attention.json").read_text()) == json.loads(json.dumps(results))
    figures = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    names = ("entropy", "entropy_change", "number_mass", "number_mass_change", "comparison")
    assert figures == {f"{name}.{kind}" for name in names for kind in ("png", "csv")}
    printed = capsys.readouterr().out
    assert "3 questions" in printed and "llama-student − llama" in printed and printed.count("  layer ") == 2
    first = results["changes"]["llama-student"]["heads"][0]
    assert results["models"]["llama"]["number_mass"][first["layer"]][first["head"]] == pytest.approx(first["base"])
    with pytest.raises(UserError, match=r"--save .*out holds an analysis; give another folder, or --overwrite to replace it"):
        attention.analyze_attention(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ()}, "--model is missing; give Hugging Face folders, the base first"),
        ({"data": ""}, "--data is missing; give a jsonl file of questions"),
        ({"samples": 0}, "--samples 0 must be above 0"),
        ({"model": ("LAB/llama", "LAB/llama")}, "--model .*llama .*llama: both are named llama; name one, as in first="),
        ({"model": ("LAB/llama", "LAB/small")}, r"small has \(2, 4\) layers and heads, .*llama \(3, 4\), and each is compared with its like"),
        ({"model": ("LAB/native",)}, "native is a native checkpoint; turn it into a Hugging Face folder with checkpoint_tools/mp_to_hf.py"),
        ({"model": ("LAB/adapters",)}, "adapters holds adapters, and whole models are compared; export the run with --merge-lora"),
        ({"data": "LAB/wordless.jsonl"}, "wordless.jsonl: no question holds a number in digits; give questions such as GSM8K's"),
    ],
)
def test_a_mistake_is_one_line_before_weights_are_loaded(lab, monkeypatch, changes, message):
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("weights were loaded"))
    if not (lab / "small").exists():
        tiny_folder(lab / "small", "llama", layers=2, vocab_size=300)
        for name, file in (("native", "latest_checkpointed_iteration.txt"), ("adapters", "adapter_config.json")):
            (lab / name).mkdir()
            (lab / name / file).write_text("1")
        (lab / "wordless.jsonl").write_text('{"question": "Who?", "answer": "5"}\n')
    there = lambda value: value.replace("LAB", str(lab)) if isinstance(value, str) else value
    changes = {name: tuple(map(there, value)) if isinstance(value, tuple) else there(value) for name, value in changes.items()}
    with pytest.raises(UserError, match=message):
        attention.analyze_attention(settings(lab, "llama", **{"model": (str(lab / "llama"),), **changes}))


def test_help_says_what_is_measured_and_how_it_is_called():
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "analyze_attention.py"), "--help"], capture_output=True, text=True)
    said = " ".join(done.stdout.split())
    for words in ("--model base=smollm2 kd=runs/kd/hf", "-sum a log a", "nats", "The first --model is the base", "--queries"):
        assert words in said
