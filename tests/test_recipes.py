"""The comparison in one command: its settings are the paper's; its stages run in order, once, and are named when they fail."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megakd.config import EvaluateConfig, from_flags
from megakd.config import from_yaml as read_yaml
from megakd.data.batch import Sample
from megakd.dry_run import load_of
from megakd.memory import memory_per_stage
from megakd.models.sizes import parameter_count
from megakd.runtime.parallel_layout import Grid

ROOT = Path(__file__).parents[1]
from_yaml = functools.cache(read_yaml)
SCALES = sorted(file.parent.name for file in ROOT.glob("configs/*/scale.yaml"))
METHODS = {"sft_teacher": "sft", "sft_student": "sft"}  # the other stages are called like their methods
STAGES = ("sft_teacher", "sft_student", "kd", "seqkd", "minillm", "promptkd")
PAPER = {  # scale: rows of a step, iterations and learning rate of each stage, in PromptKD's scripts
    "gpt2-base": [(32, 3570, 5e-5), (32, 7140, 5e-4), (32, 7140, 5e-4), (32, 7140, 5e-4), (256, 1788, 5e-6), (256, 880, 5e-5)],
    "gpt2-medium": [(32, 3570, 5e-5), (32, 7140, 1e-4), (32, 7140, 1e-4), (32, 7140, 1e-4), (64, 5000, 5e-6), (64, 3560, 1e-5)],
    "gpt2-large": [(32, 3570, 5e-5), (32, 3570, 1e-4), (32, 3570, 1e-4), (32, 3570, 1e-4), (64, 5000, 5e-6), (64, 2670, 5e-6)],
    "opt-1.3b": [(32, 3570, 1e-5), (32, 3570, 5e-5), (32, 3570, 5e-5), (32, 3570, 5e-5), (64, 5000, 5e-6), (64, 1780, 5e-6)],
    "opt-6.7b": [(32, 3570, 1e-5), (32, 3570, 1e-5), (32, 3570, 1e-5), (32, 3570, 1e-5), (64, 5000, 5e-6), (64, 1780, 5e-6)],
}
PAPER["opt-2.7b"], PAPER["llama-7b"] = PAPER["opt-1.3b"], PAPER["opt-6.7b"]


def recipe(name: str):
    """A helper of scripts/recipes as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "scripts" / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PLAN = recipe("plan")


# ---- settings


@pytest.mark.parametrize("scale", SCALES)
def test_every_stage_has_settings_that_can_run_on_the_ranks_of_the_scale(scale):
    folder, ranks = ROOT / "configs" / scale, PLAN.Plan(ROOT / "configs" / scale).ranks
    assert {file.stem for file in folder.iterdir()} == {*STAGES, "evaluate", "scale"}
    for stage in STAGES:
        config = from_yaml(folder / f"{stage}.yaml")
        teacher = ["--teacher-model", "t"] if config.needs_teacher else []
        from_flags(["--model", "m", *teacher, "--train-data", "d", "--valid-data", "v", "--save", "s"], config).check()
        replicas, rest = divmod(ranks, config.parallel.tensor_model_parallel_size)
        assert (config.method, rest) == (METHODS.get(stage, stage), 0)
        assert config.training.global_batch_size % (config.training.micro_batch_size * replicas) == 0, stage
    evaluation = from_yaml(folder / "evaluate.yaml", EvaluateConfig)
    from_flags(["--model", "m", "--teacher-model", "t", "--data", "d"], evaluation).check()


@pytest.mark.parametrize("scale", PAPER)
def test_the_papers_scales_have_the_papers_batches_lengths_and_learning_rates(scale):
    for stage, wanted in zip(STAGES, PAPER[scale]):
        config = from_yaml(ROOT / "configs" / scale / f"{stage}.yaml")
        training, data = config.training, config.data
        assert (training.global_batch_size, PLAN.iterations(config), training.lr) == wanted, stage
        assert (data.max_length, data.max_prompt_length, training.clip_grad, training.seed) == (512, 256, 1.0, 10)
        assert training.lr_warmup_iters == (100 if stage in ("minillm", "promptkd") else 0)
        chosen = config.selection
        assert (chosen.metric, chosen.eval_answers, chosen.eval_decoding) == ("valid/rouge_l", True, "sample"), stage
        assert training.weight_decay == (1e-6 if stage == "minillm" else 1e-2)
    assert (config.promptkd.prompt_len, config.promptkd.base_coef, config.promptkd.teacher_lr) == (7, 1.0, training.lr)
    evaluation = from_yaml(ROOT / "configs" / scale / "evaluate.yaml", EvaluateConfig)
    assert (evaluation.seeds, evaluation.responses.max_new_tokens, evaluation.exposure_bias) == ((10, 20, 30, 40, 50), 256, True)


def test_a_plan_counts_bytes_and_operations():
    plan = PLAN.Plan(ROOT / "configs" / "gpt2-base")
    teacher, student = parameter_count(plan.teacher), parameter_count(plan.student)
    assert (teacher, student) == pytest.approx((1.557e9, 124e6), rel=0.01)
    assert parameter_count(PLAN.Plan(ROOT / "configs" / "llama-7b").student) == pytest.approx(6.74e9, rel=0.001)
    assert parameter_count(PLAN.Plan(ROOT / "configs" / "opt-1.3b").student) == pytest.approx(1.316e9, rel=0.001)
    stages = {stage.name: stage for stage in plan.stages()}
    assert stages["sft_teacher"].bytes > 18 * teacher  # weight, gradient, master weight, two moments
    assert stages["kd"].bytes > stages["sft_student"].bytes + 2 * teacher
    assert stages["kd"].seconds > stages["sft_student"].seconds


def test_a_plans_memory_is_that_of_a_dry_run():
    """Of the same models, with rows as long as they may be."""
    plan = PLAN.Plan(ROOT / "configs" / "tiny")
    config = from_yaml(ROOT / "configs" / "tiny" / "promptkd.yaml")
    grid = Grid(0, config.parallel.tensor_model_parallel_size, 1, plan.ranks // config.parallel.tensor_model_parallel_size)
    row = Sample(0, (1,) * config.data.max_prompt_length, (1,) * config.data.max_length)
    load = load_of(config, SimpleNamespace(dataset=[row]), grid)
    (memory,) = memory_per_stage(config, plan.student, [plan.teacher], (grid, grid), load)
    assert plan.training_bytes(config, plan.student) == memory.peak


def test_a_dry_run_prints_every_stage_and_what_is_there_already(tmp_path):
    (tmp_path / "kd" / "hf").mkdir(parents=True)
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(paper("tiny", tmp_path, "--dry-run"), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert {*STAGES, *(f"evaluate {stage}" for stage in STAGES)} <= rows.keys()
    assert "there already" in rows["kd"] and "there already" not in rows["seqkd"]
    assert not (tmp_path / "logs").exists()


# ---- stages


def paper(*words, recipe: str = "paper.sh") -> list[str]:
    return ["bash", str(ROOT / "scripts" / "recipes" / recipe), *map(str, words)]


FAKE = """#!/usr/bin/env bash
# In the place of python: notes the command, and leaves the result that the command would leave.
echo "$*" >> {calls}
save= script=
for word in "$@"; do
    case $previous in --save | --out) save=$word ;; esac
    case $word in *.py) script=${{word##*/}} ;; esac
    previous=$word
done
case "$*" in {broken}) echo "out of memory"; exit 1 ;; *--best*) echo promptkd; echo kd; exit ;; esac
case $script in
    pretrain_kd.py) mkdir -p $save/hf $save/best ;;
    evaluate.py) mkdir -p $save && touch $save/results.json ;;
    analyze_attention.py) mkdir -p $save && touch $save/attention.json ;;
    report*.py) mkdir -p $save/report && echo "the table" > $save/report/table.md ;;
    *) mkdir -p $save ;;
esac
"""


def run_with_fake_python(folder: Path, broken: str = "nothing", recipe: str = "paper.sh", words: tuple[str, ...] = ("tiny",), **environment):
    """What a recipe said, by default of its tiny scale, and the commands it gave."""
    fake, calls = folder / "python", folder / "calls"
    fake.write_text(FAKE.format(calls=calls, broken=f"*{broken}*"))
    fake.chmod(0o755)
    calls.write_text("")
    environment = os.environ | {"PYTHON": str(fake), "DATA": "data"} | environment
    done = subprocess.run(paper(*words, folder / "out", recipe=recipe), capture_output=True, text=True, env=environment)
    return done, calls.read_text().splitlines()


def test_a_failed_stage_is_named_and_the_same_command_continues_with_it(tmp_path):
    done, calls = run_with_fake_python(tmp_path, broken="tiny/seqkd.yaml")
    assert done.returncode == 1 and "seqkd.yaml" in calls[-1]
    assert done.stdout.splitlines()[-1].startswith("error: stage seqkd failed; see ")
    assert (tmp_path / "out" / "logs" / "seqkd.log").read_text() == "out of memory\n"

    done, calls = run_with_fake_python(tmp_path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "the table"
    names = [next((word for word in call.split() if word.endswith(".yaml")), "") for call in calls]
    assert [Path(name).stem for name in names] == ["seqkd", "minillm", "promptkd", *["evaluate"] * 6, ""]

    done, calls = run_with_fake_python(tmp_path)
    assert done.returncode == 0 and calls == [] and done.stdout.count("skipped") == 15


def test_every_method_begins_where_the_paper_lets_it_begin(tmp_path):
    _, calls = run_with_fake_python(tmp_path)
    out = tmp_path / "out"
    by_stage = {Path(call.split("--config ")[1].split()[0]).stem: call for call in calls if "pretrain_kd.py" in call}
    for stage in ("sft_student", "kd", "seqkd"):
        assert f"--model {out}/data/student" in by_stage[stage]
    for stage in ("minillm", "promptkd"):
        assert f"--model {out}/initial_student" in by_stage[stage]
    taught = {stage for stage, call in by_stage.items() if f"--teacher-model {out}/sft_teacher/best" in call}
    assert taught == {"kd", "seqkd", "minillm", "promptkd"}
    scored = {call.split("--model ")[1].split()[0] for call in calls if "evaluate.py" in call}
    assert scored == {f"{out}/{stage}/best" for stage in STAGES}


def test_a_model_put_in_the_place_of_a_stage_is_taken(tmp_path):
    (tmp_path / "out" / "sft_teacher" / "hf").mkdir(parents=True)
    _, calls = run_with_fake_python(tmp_path)
    assert [call for call in calls if f"--teacher-model {tmp_path}/out/sft_teacher/hf" in call and "kd.yaml" in call]


def test_an_unknown_scale_and_missing_data_are_told(tmp_path):
    done = subprocess.run(paper("huge", tmp_path), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: SCALE huge: configs/ has gpt2-base")
    environment = {name: value for name, value in os.environ.items() if name != "DATA"}
    done = subprocess.run(paper("tiny", tmp_path), capture_output=True, text=True, env=environment)
    assert done.returncode and "DATA: is not set; name the folder that holds dolly/train.jsonl" in done.stderr


# ---- helpers


def test_test_sets_are_cut_to_the_rows_of_the_scale(tmp_path, capsys):
    prepare = recipe("prepare")
    for name in ("dolly/train.jsonl", "dolly/dev.jsonl", "dolly/valid.jsonl", "sinst/11_/valid.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "a", "output": "b"}\n' * 5)
    prepare.copy_tests(tmp_path, tmp_path / "test", 3)
    assert {file.stem: file.read_text().count("\n") for file in (tmp_path / "test").iterdir()} == {"dolly": 3, "s-ni": 3}
    assert "holds no vicuna/valid.jsonl; the comparison goes without it" in capsys.readouterr().out
    (tmp_path / "dolly/dev.jsonl").unlink()
    with pytest.raises(SystemExit, match=r"holds no dolly/dev.jsonl; it needs MiniLLM's"):
        prepare.check_data(tmp_path)


def test_the_initial_student_is_the_saved_checkpoint_with_the_lowest_held_out_loss(tmp_path):
    rows = [{"iteration": 0, "valid/lm_loss": 9.0}, {"iteration": 5, "loss/lm": 1.0}, {"iteration": 10, "valid/lm_loss": 2.0}]
    rows += [{"iteration": 20, "valid/lm_loss": 1.0}, {"iteration": 30, "valid/lm_loss": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for iteration in (10, 30):  # 20 was not saved
        (tmp_path / "checkpoints" / f"iter_{iteration:07d}").mkdir(parents=True)
    assert recipe("initial_student").best_checkpoint(tmp_path) == (30, 1.5)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 30, "loss/lm": 1.0}\n')
    with pytest.raises(SystemExit, match="no checkpoint whose held-out loss was logged; give the folder of an SFT run with --valid-data"):
        recipe("initial_student").best_checkpoint(tmp_path)


def result(score: float, **more) -> dict:
    numbers = {"samples": 7, "rouge_l": score, "rouge_l_sd": 0.5, "lm_loss": 3.0, **more}
    return {"config": {"seeds": [1, 2]}, "sets": {"dolly": numbers, "vicuna": {**numbers, "rouge_l": score + 2}}}


def test_the_table_has_a_row_a_method_and_says_what_was_measured():
    report = recipe("report")
    table = report.table({"teacher": result(20.0), "KD": result(10.0, reverse_kl=0.25, ex_acc_err=4.0)})
    assert table.splitlines()[2:4] == [
        "| teacher | 20.00 ± 0.50 | 22.00 ± 0.50 | 21.00 | 3.0000 | - | - |",
        "| KD | 10.00 ± 0.50 | 12.00 ± 0.50 | 11.00 | 3.0000 | 0.2500 | 4.00 |",
    ]
    assert "over 2 seeds; rows: 7 dolly, 7 vicuna" in table
