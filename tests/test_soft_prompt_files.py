"""PromptKD's prompt as PEFT's files: written by a run, read by PEFT, and read back by the commands that answer and measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file
from test_trainer import command, inputs, run  # noqa: F401  a fixture
from tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.checkpointing.native import NativeCheckpoint
from megakd.checkpointing.soft_prompt_folder import SoftPromptFolder
from megakd.config import Config, EvaluateConfig, GenerateConfig, from_flags
from megakd.errors import UserError
from megakd.evaluation.evaluator import evaluate
from megakd.generation.answers import open_folders
from megakd.generation.write_responses import write_responses


@pytest.fixture(scope="module")
def trained(inputs) -> Path:  # noqa: F811
    """A run of PromptKD at TP 2: the folder of its prompt."""
    run_distributed(run, 2, command(inputs, "prompted", "promptkd", **{"teacher-lr": "0.05"}), tp=2)
    return inputs / "prompted" / "soft_prompt"


def prompted_teacher(inputs: Path, folder: Path):  # noqa: F811
    peft = pytest.importorskip("peft")
    teacher = AutoModelForCausalLM.from_pretrained(inputs / "teacher", attn_implementation="eager")
    return peft.PeftModel.from_pretrained(teacher, folder).eval()


def gold_rows(inputs: Path) -> list[tuple[list[int], list[int]]]:  # noqa: F811
    """Prompt and response ids, EOS included."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "teacher")
    rows = [json.loads(line) for line in (inputs / "valid.jsonl").read_text().splitlines()]
    encoded = [(tokenizer(row["prompt"])["input_ids"], row["prompt"] + row["response"]) for row in rows]
    return [(prompt, [*tokenizer(text)["input_ids"][len(prompt) :], tokenizer.eos_token_id]) for prompt, text in encoded]


def by_peft(model, rows) -> list[torch.Tensor]:
    """log p of every response token, float64."""
    found = []
    for prompt, response in rows:
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(response) - 1 : -1]
        found.append(logits.double().log_softmax(-1))
    return found


def measuring(inputs: Path, folder: Path, **more) -> EvaluateConfig:  # noqa: F811
    flags = {"model": inputs / "teacher", "soft-prompt": folder, "data": inputs / "valid.jsonl", "max-prompt-length": 30, "max-new-tokens": 12}
    words = [str(word) for name, value in {**flags, **more}.items() for word in (f"--{name}", *([] if value is True else [value]))]
    return from_flags(words, EvaluateConfig())


def on_rank(layout, command, config):
    return command(config)


def test_the_file_is_what_the_run_has_learnt(inputs, trained):  # noqa: F811
    saved = NativeCheckpoint(inputs / "prompted" / "checkpoints")
    written = load_file(trained / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(written, saved.read("extra.vectors", (slice(0, 7), slice(0, 64))))
    first = NativeCheckpoint(inputs / "prompted" / "checkpoints", iteration=2).read("extra.vectors", (slice(0, 7), slice(0, 64)))
    assert not torch.equal(written, first), "it is the last one"
    assert json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"] == str((inputs / "teacher").resolve())


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)])
def test_losses_behind_it_are_pefts(inputs, trained, tp, pp):  # noqa: F811
    """evaluate.py --soft-prompt against PEFT on the teacher, and without it a loss that differs."""
    rows, layout = gold_rows(inputs), {"tp": tp, "pp": pp}
    log_p = by_peft(prompted_teacher(inputs, trained), rows)
    gold = [x.gather(-1, torch.tensor(response)[:, None]) for x, (_, response) in zip(log_p, rows)]
    expected = -torch.cat(gold).mean().item()
    found = run_distributed(on_rank, 2, evaluate, measuring(inputs, trained, **layout, greedy=True), **layout)[0]["sets"]["valid"]
    assert found["lm_loss"] == pytest.approx(expected, rel=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(inputs / "teacher", attn_implementation="eager").eval()
    unprompted = -torch.cat([x.gather(-1, torch.tensor(r)[:, None]) for x, (_, r) in zip(by_peft(plain, rows), rows)]).mean().item()
    assert abs(unprompted - expected) > 1e-2


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)])
def test_answers_behind_it_are_pefts(inputs, trained, tmp_path, tp, pp):  # noqa: F811
    flags = {"model": inputs / "teacher", "soft-prompt": trained, "data": inputs / "valid.jsonl", "save": tmp_path / "answers.jsonl"}
    flags |= {"max-prompt-length": 30, "max-new-tokens": 8, "tp": tp, "pp": pp}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    config = from_flags([*words, "--greedy", "--token-ids"], GenerateConfig())
    run_distributed(on_rank, 2, write_responses, config, tp=tp, pp=pp)
    model = prompted_teacher(inputs, trained)
    written = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    for row in written[:6]:
        ids, said = row["prompt_ids"], row["response_ids"]
        likeliest = by_peft(model, [(ids, said)])[0].argmax(-1).tolist()
        assert likeliest == said and (said[-1] == 0 or len(said) == 8), "each token is the likeliest one behind those before it"


def test_exposure_bias_is_that_of_the_prompted_model(inputs, trained, tmp_path):  # noqa: F811
    """KL(p‖p_P), p the teacher itself, recomputed from the answers that were written down."""
    more = {"teacher-model": "self", "exposure-bias": True, "save": tmp_path / "out", "seeds": 1}
    run_distributed(on_rank, 1, evaluate, measuring(inputs, trained, **more))
    written = [json.loads(line) for line in (tmp_path / "out" / "exposure_bias.jsonl").read_text().splitlines()][:4]
    rows = [(row["prompt_ids"], row["response_ids"]) for row in written]
    plain = AutoModelForCausalLM.from_pretrained(inputs / "teacher", attn_implementation="eager").eval()
    for row, q, p in zip(written, by_peft(prompted_teacher(inputs, trained), rows), by_peft(plain, rows)):
        assert row["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3, abs=1e-6)


def test_a_teacher_on_ranks_of_its_own_hands_its_prompt_back(inputs):  # noqa: F811
    flags = {"train-iters": 1, "hidden-dropout": 0, "eval-interval": 1}
    run_distributed(run, 1, command(inputs, "together", "promptkd", **flags))
    run_distributed(run, 2, command(inputs, "apart", "promptkd", **flags, **{"teacher-ranks": 1}))
    together, apart = (SoftPromptFolder.read(inputs / name / "soft_prompt").vectors for name in ("together", "apart"))
    assert torch.allclose(together, apart, rtol=1e-5, atol=1e-7)


def test_the_files_of_promptkds_own_code_are_read(inputs, trained, tmp_path):  # noqa: F811
    """PEFT's, as a pickle of half precision: save_pretrained(safe_serialization=False) of a model in fp16."""
    prompted_teacher(inputs, trained).half().save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(path.name for path in tmp_path.glob("adapter*")) == ["adapter_config.json", "adapter_model.bin"]
    ours = SoftPromptFolder.read(trained).vectors
    assert torch.equal(SoftPromptFolder.read(tmp_path).vectors, ours.half().float())


def test_a_folder_that_does_not_fit_is_told_before_weights_load(inputs, trained, tmp_path, monkeypatch):  # noqa: F811
    tiny_folder(tmp_path / "narrow", "gpt2", layers=1, hidden=32, vocab_size=100)
    AutoTokenizer.from_pretrained(inputs / "teacher").save_pretrained(tmp_path / "narrow")
    refused = {
        (trained, "narrow"): r"--soft-prompt .*soft_prompt has vectors of 64 numbers, and --model .*narrow embeddings of 32; give the model",
        (tmp_path, "teacher"): r"--soft-prompt .*: no adapter_config.json; give the folder soft_prompt/ that a run of promptkd leaves",
    }
    for (folder, model), message in refused.items():
        path = tmp_path / model if model == "narrow" else inputs / model
        with pytest.raises(UserError, match=message):
            open_folders(measuring(inputs, folder, model=path))
    too_long = measuring(inputs, trained, **{"max-prompt-length": 40, "max-new-tokens": 18})
    with pytest.raises(UserError, match=r"behind the 7 vectors of --soft-prompt is more than the 64 positions .* lower their sum to 57"):
        open_folders(too_long)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match=r"peft_type 'LORA', which is no soft prompt; LORA's folder is a --model"):
        open_folders(measuring(inputs, lora))


def test_other_methods_leave_none(inputs):  # noqa: F811
    run_distributed(run, 1, command(inputs, "unprompted", "sft", **{"train-iters": 1}))
    assert not (inputs / "unprompted" / "soft_prompt").exists() and Config().method == "promptkd"
