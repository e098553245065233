"""A whole run: what it leaves behind, and that a run that was cut off goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_distributed
from tasks import make_rows
from tiny import tiny_folder
from train_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd import trainer
from megakd.config import Config, OutputConfig, from_yaml, parse
from megakd.data.batch import Sample
from megakd.data.end_ids import EndIds
from megakd.reporting.jsonl import read_jsonl


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("run"))


def write_inputs(root: Path) -> Path:
    """A student with dropout, a teacher, and a little data."""
    rows = make_rows(48, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    for seed, (name, overrides) in enumerate({"student": {"resid_pdrop": 0.1, "embd_pdrop": 0.1}, "teacher": {}}.items()):
        tiny_folder(root / name, "gpt2", layers=2, vocab_size=len(tokenizer), seed=seed, **overrides)
        tokenizer.save_pretrained(root / name)
    tiny_folder(root / "wider", "gpt2", layers=2, hidden=96, vocab_size=len(tokenizer), seed=2)
    tokenizer.save_pretrained(root / "wider")
    for name, part in {"train": rows[:32], "valid": rows[32:]}.items():
        lines = [json.dumps({"prompt": row["prompt"], "response": row["response"]}) for row in part]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def command(root: Path, save: str, method: str, **flags) -> list[str]:
    settings = {
        "method": method, "model": root / "student", "train-data": root / "train.jsonl", "valid-data": root / "valid.jsonl", "max-length": 16,
        "max-prompt-length": 10, "train-iters": 4, "micro-batch-size": 2, "global-batch-size": 8, "lr": "1e-3", "save": root / save,
        "save-interval": 2, "eval-interval": 2,
    }  # fmt: skip
    settings |= {} if method == "sft" else {"teacher-model": root / "teacher"}
    return [
        str(word) for name, value in (settings | flags).items() for word in (f"--{name}", *([] if value is True else [value]))
    ]


class CutOffError(Exception):
    """The machine went away."""


def without_figures() -> None:
    """In this rank: they take half of a tiny run's time. `test_a_run_leaves_what_it_promises` has them."""
    trainer.plot_training = lambda run_folder: []


def run(layout, arguments, cut_off_before=None, *, figures=False):
    """One run on this rank; cut off before an iteration where that is asked for."""
    if not figures:
        without_figures()
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    iterate = trainer.Trainer._iterate

    def until(self):
        if self.iteration == cut_off_before:
            raise CutOffError
        iterate(self)

    trainer.Trainer._iterate = until
    with contextlib.suppress(CutOffError):
        trainer.train(parse(arguments))


def numbers(folder: Path) -> list[dict]:
    """What was logged, without seconds."""
    kept = ("iteration", "loss", "valid", "grad_norm", "lr", "tokens")
    return [
        {name: value for name, value in row.items() if name.split("/")[0] in kept} for row in read_jsonl(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    "method, flags",
    [
        pytest.param("sft", {}, id="sft"),
        pytest.param("promptkd", {}, id="promptkd"),
        pytest.param("minillm", {"num-rollouts": 8, "ppo-epochs": 2, "num-generations": 4}, id="minillm"),
        pytest.param("seqkd", {}, id="seqkd"),
        pytest.param("kd", {"on-policy-ratio": 0.5, "seed": 1}, id="kd that writes now and then"),
        pytest.param("kd", {"hidden-coef": 0.5, "teacher-model": "wider"}, id="kd that trains a projection"),
        pytest.param("distillm", {"replay-capacity": 12, "lr": 0.05, "eval-interval": 1, "seed": 7}, id="distillm"),
    ],
)
def test_a_run_cut_off_and_continued_logs_the_same_numbers(inputs, request, method, flags):
    unbroken, broken = f"{request.node.callspec.id}-unbroken", f"{request.node.callspec.id}-broken"
    if "teacher-model" in flags:
        flags = flags | {"teacher-model": inputs / flags["teacher-model"]}
    run_distributed(run, 2, command(inputs, unbroken, method, **flags), tp=2)
    run_distributed(run, 2, command(inputs, broken, method, **flags), 4, tp=2)  # iterations 1 to 3, the last checkpoint after 2
    assert [row["iteration"] for row in numbers(inputs / broken)][-1] == 3
    run_distributed(run, 2, command(inputs, broken, method, **flags), tp=2)
    assert numbers(inputs / broken) == numbers(inputs / unbroken)
    if method == "distillm":
        shares = [row["on_policy_share"] for row in read_jsonl(inputs / broken / "metrics.jsonl") if "on_policy_share" in row]
        assert shares[-1] >= 0.1, "the held-out loss rose, and with this seed the student wrote"


def test_a_run_continues_at_another_layout(inputs):
    first = {"tp": 2, "save-rollouts": True, "num-generations": 2}
    run_distributed(run, 2, command(inputs, "tp2", "promptkd", **first, **{"hidden-dropout": 0}), tp=2)
    run_distributed(run, 2, command(inputs, "moved", "promptkd", **first, **{"hidden-dropout": 0}), 3, tp=2)
    run_distributed(run, 2, command(inputs, "moved", "promptkd", **(first | {"tp": 1, "pp": 2, "hidden-dropout": 0})), pp=2)
    for ours, theirs in zip(numbers(inputs / "moved"), numbers(inputs / "tp2"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    rollouts = [
        [(row["sample_id"], row["generation"], row["response"]) for row in read_jsonl(inputs / name / "rollouts.jsonl")]
        for name in ("moved", "tp2")
    ]
    assert rollouts[0] == rollouts[1] and [number for _, number, _ in rollouts[0]] == [0, 1] * 16


def test_a_run_leaves_what_it_promises(inputs):
    run_distributed(partial(run, figures=True), 2, command(inputs, "kept", "promptkd", **{"save-rollouts": True}))
    folder = inputs / "kept"
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    for name in (
        "config.yaml", "metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "tensorboard", "figures/training.png", "hf/config.json",
        "hf/model.safetensors", "hf/tokenizer.json", "hf/megakd_export.json", "checkpoints/latest_checkpointed_iteration.txt",
        "checkpoints/iter_0000002/megakd_checkpoint.json", "checkpoints/iter_0000004/huggingface/config.json",
        "checkpoints/iter_0000004/run_config.yaml",
    ):  # fmt: skip
        assert name in left, name
    assert not [name for name in left if "tmp" in name.lower()], "nothing half-written"
    metrics = read_jsonl(folder / "metrics.jsonl")
    parts = {
        "loss/reverse_kl",
        "loss/prompt_kd",
        "loss/prompt_base",
        "time/rollout",
        "time/teacher",
        "time/prompt_step",
        "time/student_step",
    }
    assert parts <= metrics[1].keys()
    model, report = AutoModelForCausalLM.from_pretrained(folder / "hf", output_loading_info=True)
    assert not any(report.values()), report
    assert AutoTokenizer.from_pretrained(folder / "hf").vocab_size <= model.config.vocab_size


@pytest.mark.parametrize("native", ["first/checkpoints", "first/checkpoints/iter_0000002"])
def test_a_student_may_be_another_runs_checkpoint(inputs, native):
    run_distributed(run, 1, command(inputs, "first", "sft"))
    save = native.replace("/", "-")
    run_distributed(run, 1, command(inputs, save, "sft", model=inputs / native))
    first, model = (AutoModelForCausalLM.from_pretrained(inputs / name / "hf").state_dict() for name in ("first", save))
    assert first.keys() == model.keys() and any(not torch.equal(tensor, model[name]) for name, tensor in first.items())
    assert (inputs / save / "hf" / "tokenizer.json").read_bytes() == (inputs / "student" / "tokenizer.json").read_bytes()


def test_a_run_cut_off_while_it_writes_its_settings_keeps_the_old_ones(tmp_path, monkeypatch):
    def half(file, text, **options):
        file.open("w").write(text[: len(text) // 2])
        raise CutOffError

    unfinished = trainer.Trainer.__new__(trainer.Trainer)
    unfinished.config, unfinished.folder, unfinished.iteration = Config(output=OutputConfig(save=str(tmp_path))), tmp_path, 2
    unfinished.checkpoints, unfinished.sums = tmp_path / "checkpoints", {}
    unfinished.checkpoints.mkdir()
    unfinished._begin_folder()
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(CutOffError):
        unfinished._begin_folder()
    assert from_yaml(tmp_path / "config.yaml") == unfinished.config


def bare_trainer(**output) -> trainer.Trainer:
    """Settings, and nothing loaded."""
    bare, config = trainer.Trainer.__new__(trainer.Trainer), Config()
    bare.config = replace(config, output=replace(config.output, **output), training=replace(config.training, global_batch_size=3))
    bare.total_iters = 10
    return bare


def test_evaluations_and_saves_are_due_when_the_flags_say():
    """Every so many iterations, and after the last."""

    def due(interval):
        bare = bare_trainer()
        return [bare.iteration for bare.iteration in range(1, 11) if bare._due(interval)]

    assert (due(4), due(None), due(1)) == ([4, 8, 10], [10], list(range(1, 11)))


def test_an_evaluation_is_as_long_as_the_flag_says(monkeypatch):
    """--eval-iters counts global batches; answers to look at are greedy."""
    for iters, rows in ((2, 6), (None, 20), (50, 20)):
        bare = bare_trainer(eval_iters=iters)
        bare.data = SimpleNamespace(valid=[Sample(i, (1, 2), (3, 0)) for i in range(20)])
        assert [s.sample_id for s in trainer.valid_samples(bare.config, bare.data.valid)] == list(range(rows))
    asked, bare.iteration = [], 0
    bare.method, bare.logger = SimpleNamespace(student=None), SimpleNamespace(log_samples=lambda *rows: asked.append(rows))
    bare.ends, bare.tokenizer = EndIds(stop=(0,), taught=0), SimpleNamespace(decode=lambda ids, **_: str(list(ids)))
    monkeypatch.setattr(trainer, "generate", lambda *given, **_: asked.append(given) or [[7, 0]] * 4)
    bare._show_samples()
    (_, prompts, ids, sampling), (_, rows) = asked
    assert sampling.greedy and (prompts, ids) == ([(1, 2)] * 4, [0, 1, 2, 3])
    assert rows[0] == {"prompt": "[1, 2]", "student": "[7, 0]", "reference": "[3, 0]"}


def test_rollouts_recompute_a_step(inputs):
    """Prompt and response ids with their mask are all that a loss needs: transformers finds the first iteration's loss from them."""
    flags = {"on-policy-ratio": 1, "kd-objective": "reverse_kl", "hidden-dropout": 0, "save-rollouts": True, "train-iters": 1}
    run_distributed(run, 2, command(inputs, "recomputed", "kd", **flags))
    student, teacher = (AutoModelForCausalLM.from_pretrained(inputs / name).eval() for name in ("student", "teacher"))
    rows = [row for row in read_jsonl(inputs / "recomputed" / "rollouts.jsonl") if row["iteration"] == 1]
    distance, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([row["prompt"] + row["response"]])
        with torch.no_grad():
            log_q, log_p = (model(ids).logits[0, :-1].double().log_softmax(-1) for model in (student, teacher))
        distance += ((log_q.exp() * (log_q - log_p)).sum(-1) * torch.tensor(row["loss_mask"])).sum().item()
        tokens += sum(row["loss_mask"])
    logged = read_jsonl(inputs / "recomputed" / "metrics.jsonl")[1]
    assert (len(rows), logged["tokens"]) == (8, tokens) and logged["loss/reverse_kl"] == pytest.approx(distance / tokens, rel=1e-5)


@pytest.mark.parametrize(
    "method, flags, written_in",
    [("minillm", {"num-rollouts": 8, "ppo-epochs": 2}, [1, 3]), ("kd", {"on-policy-ratio": 0.5, "seed": 1}, [1, 2, 3])],
)
def test_a_rollout_is_written_down_in_its_own_iteration_alone(inputs, method, flags, written_in):
    run_distributed(run, 1, command(inputs, f"{method}-rollouts", method, **flags, **{"save-rollouts": True}))
    rows = read_jsonl(inputs / f"{method}-rollouts" / "rollouts.jsonl")
    assert [row["iteration"] for row in rows] == [iteration for iteration in written_in for _ in range(8)]


def test_minillm_saves_between_phases_only(inputs):
    with pytest.raises(AssertionError, match=r"--save-interval 2 is no multiple of MiniLLM.s phase of 4"):
        run_distributed(run, 1, command(inputs, "phase", "minillm", **{"num-rollouts": 16, "ppo-epochs": 2}))


PROMPTS_ALONE = {"kd": {"on-policy-ratio": 1.0}, "minillm": {"lm-coef": 0.0, "num-rollouts": 8, "ppo-epochs": 1}}


@pytest.mark.parametrize("method", PROMPTS_ALONE)
def test_prompts_alone_suffice_where_no_response_is_learnt(inputs, method):
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()]
    (inputs / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    for data in ("train", "prompts"):
        flags = PROMPTS_ALONE[method] | {"train-data": inputs / f"{data}.jsonl", "train-iters": 2}
        run_distributed(run, 1, command(inputs, f"{method}-{data}", method, **flags))
    assert numbers(inputs / f"{method}-prompts") == numbers(inputs / f"{method}-train")


FAT_STARTER = """
import subprocess, sys
held = b"1" * 2_000_000_000
print(subprocess.run([sys.executable, "-c", "from megakd.trainer import peak_memory; print(peak_memory())"], capture_output=True, text=True).stdout)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's peak is its allocator's")
def test_the_peak_is_not_that_of_whoever_started_the_run():
    done = subprocess.run([sys.executable, "-c", FAT_STARTER], capture_output=True, text=True, check=True)
    assert 10e6 < int(done.stdout) < 1.5e9
