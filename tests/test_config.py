"""Flags, the YAML file under them, and a help that needs nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from megakd_kernels import OBJECTIVES

from megakd.config import BenchmarkConfig, CacheConfig, Config, EvaluateConfig, GenerateConfig, flag_name, from_yaml, parse
from megakd.config.distillation import OBJECTIVES as WORDS
from megakd.errors import UserError

ROOT = Path(__file__).parents[1]
NEEDED = ["--method", "sft", "--model", "m", "--train-data", "d", "--save", "s", "--train-iters", "3"]


def test_flags_lie_over_the_yaml_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3\nmicro-batch-size: 8\nsequence_parallel: true\ntensor_model_parallel_size: 2\nteacher_lr: null\n")
    config = parse([*NEEDED, "--config", str(file), "--micro-batch-size", "4"])
    assert (config.training.lr, config.training.micro_batch_size, config.training.global_batch_size) == (1e-3, 4, 32)
    assert config.parallel.sequence_parallel and config.promptkd.teacher_lr is None


@pytest.mark.parametrize("words", [["--tp", "2"], ["--tensor_model_parallel_size", "2"], ["--tensor-model-parallel-size=2"]])
def test_spellings_of_other_projects_are_understood(words):
    assert parse([*NEEDED, *words]).parallel.tensor_model_parallel_size == 2


def test_names_of_hugging_face_and_minillm_are_understood():
    words = ["--method", "sft", "--model-name-or-path", "m", "--data-path", "d", "--output-dir", "s", "--max-steps", "3", "--learning-rate", "1"]
    config = parse(words)
    assert (config.models.model, config.data.train_data, config.output.save, config.training.train_iters) == ("m", "d", "s", 3)


@pytest.mark.parametrize("kind", [Config, EvaluateConfig, GenerateConfig, CacheConfig])
def test_a_saved_configuration_is_read_back_as_it_was(tmp_path, kind):
    config, file = kind(), tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.flat(), sort_keys=False))
    assert from_yaml(file, kind) == config


def test_no_two_flags_share_a_name():
    config = Config()
    groups = [vars(value) for value in vars(config).values() if hasattr(value, "__dataclass_fields__")]
    assert len(config.flat()) == 1 + sum(map(len, groups))


@pytest.mark.parametrize("script, kind", [("pretrain_kd", Config), ("evaluate", EvaluateConfig), ("generate", GenerateConfig), ("cache_teacher", CacheConfig)])
def test_help_names_every_flag_without_torch_or_torchrun(script, kind):
    code = f"import runpy, sys; sys.argv = ['{script}.py', '--help']\ntry: runpy.run_path('{ROOT}/scripts/{script}.py', run_name='__main__')\n"
    code += "except SystemExit: pass\nsys.stderr.write(str('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"})
    assert done.stderr == "False"
    assert not [name for name in kind().flat() if flag_name(name) not in done.stdout]


COMMANDS = {
    Config: [*NEEDED, "--method", "kd", "--teacher-model", "t"],
    EvaluateConfig: ["--model", "m", "--data", "d"],
    GenerateConfig: ["--model", "m", "--data", "d", "--save", "s"],
    BenchmarkConfig: [],
    CacheConfig: ["--teacher-model", "t", "--train-data", "d", "--save", "s"],
}  # fmt: skip
ZERO_SAYS_SOMETHING = {"teacher_ranks",  # none, off, all, or the first of them
    "seed", "seeds", "lm_coef", "hidden_coef", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad", "base_coef", "top_k", "teacher_lr",
    "no_repeat_ngram_size", "gamma", "kd_ratio", "on_policy_ratio", "beta", "skew_alpha", "teacher_mixed_alpha", "adam_beta1",
    "adam_beta2", "hidden_dropout", "attention_dropout", "show_data", "momentum", "teacher_ema", "priming_alpha", "lora_dropout",
}  # fmt: skip


def numeric_flags() -> list[tuple[type, str]]:
    flags = [(kind, line) for kind in COMMANDS for line in kind().flags()]
    unchecked = [line.name for _, line in flags if re.search(r"\b(int|float)\b", line.type) and not line.metadata["range"]]
    assert not unchecked, "every number has a range"
    return [(kind, line.name) for kind, line in flags if line.metadata.get("range")]


@functools.cache
def good(kind: type, method: str) -> Config:
    """A configuration without a mistake."""
    words = [*COMMANDS[kind], *(["--method", method] if method else [])]
    if method == "sft":
        words = [word for word in words if word not in ("--teacher-model", "t")]
    return parse([*words, *(["--valid-data", "v"] if method == "distillm" else [])], kind)


def with_number(config, name: str, number: float):
    """The same with one number changed, in whichever group it is; whole where the flag's is, in a list where it is one."""
    for line in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, line.name)):
            changed = with_number(value, name, number)
        elif line.name == name:
            number = int(number) if "int" in line.type and math.isfinite(number) else number
            changed = (number,) if "tuple" in line.type else number
        else:
            continue
        config = dataclasses.replace(config, **{line.name: changed})
    return config


def answer_to(kind: type, name: str, number: float) -> str:
    """The line, or nothing where the number is accepted. A flag of one method is given to that method."""
    method = next(iter(Config().readers().get(name, ("kd",)))) if kind is Config else ""
    try:
        with_number(good(kind, method), name, number).check()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf, 0, 1e31])
def test_an_absurd_number_is_one_line_that_names_its_flag_before_anything_is_loaded(value):
    for kind, name in numeric_flags():
        if value == 0 and name in ZERO_SAYS_SOMETHING:
            continue
        line = answer_to(kind, name, value)
        assert re.match(rf"{flag_name(name)}\b", line) and "\n" not in line, (name, value, line)


def test_small_and_large_seeds_are_accepted_and_others_refused():
    assert parse([*NEEDED, "--seed", str(2**63 - 1)]).training.seed == 2**63 - 1
    for kind, name in ((Config, "seed"), (EvaluateConfig, "seeds"), (GenerateConfig, "seed")):
        assert answer_to(kind, name, 2**63) == f"--{name} {2**63} must be at least 0 and below 2**63"
        assert answer_to(kind, name, -1) == f"--{name} -1 must be at least 0 and below 2**63"


@pytest.mark.parametrize("flag, value, line", [("lr", "nan", "--lr nan must be above 0"), ("train-iters", "nan", "Error parsing")])
def test_what_is_no_number_is_refused_as_it_is_read(flag, value, line, capsys):
    with pytest.raises(SystemExit):
        parse([*NEEDED, f"--{flag}", value])
    assert capsys.readouterr().err.startswith(f"error: {line}")


@pytest.mark.parametrize(
    "kind, flags, message",
    [
        (GenerateConfig, "--temperature 0", "--temperature 0 leaves nothing to sample from; give --greedy in its place"),
        (EvaluateConfig, "--temperature 0", "--temperature 0 leaves nothing to sample from; give --greedy in its place"),
        (Config, "--min-lr 1", "--min-lr 1.0 is above --lr 5e-05; lower it"),
        (Config, "--temperature 0", "--temperature 0: --method kd samples its responses and has no greedy ones; give a number above 0"),
        (GenerateConfig, "--temperature 1e-6", "--temperature 1e-06 must be at least 1e-05"),
        (GenerateConfig, "--top-p 0", "--top-p 0.0 must be above 0 and at most 1"),
        (Config, "--learnin-rate 3", "Unrecognized options: --learnin-rate, 3; did you mean --learning-rate, --lr? --help lists the flags"),
    ],
)
def test_a_number_without_a_meaning_says_what_to_give(kind, flags, message, capsys):
    with pytest.raises(SystemExit):
        parse([*COMMANDS[kind], *flags.split()], kind)
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    "kind, flags, remark",
    [
        (Config, "--beta 0.3", "--beta 0.3 has no effect without --kd-objective jsd or alpha_beta"),
        (Config, "--kd-objective jsd --skew-alpha 0.3", "--skew-alpha 0.3 has no effect without --kd-objective skew_* or alpha_beta"),
        (Config, "--eval-interval 5", "--eval-interval 5 has no effect without --valid-data"),
        (Config, "--top-p 0.9", "--top-p 0.9 has no effect with --method kd unless --on-policy-ratio is above 0"),
        (Config, "--rollout-engine vllm", "--rollout-engine vllm has no effect with --method kd unless --on-policy-ratio is above 0"),
        (Config, "--method promptkd --vllm-gpu-memory-utilization 0.5", "--vllm-gpu-memory-utilization 0.5 has no effect without --rollout-engine vllm"),
        (Config, "--method promptkd --rollout-engine vllm --vllm-gpu-memory-utilization 0.5", ""),
        (Config, "--method seqkd --kd-objective jsd", "--kd-objective jsd has no effect with --method seqkd unless --kd-ratio is above 0"),
        (Config, "--method seqkd --kd-objective jsd --kd-ratio 0.5", ""),
        (Config, "--method seqkd --kd-objective jsd --reference-behaviour seqkd-with-kd", ""),
        (Config, "--lr-decay-style constant --min-lr 1e-6", "--min-lr 1e-06 has no effect with --lr-decay-style constant"),
        (Config, "--kd-objective jsd --beta 0.3 --valid-data v --eval-interval 5 --on-policy-ratio 0.5 --top-p 0.9", ""),
        (EvaluateConfig, "--exposure-bias-skip-first", "--exposure-bias-skip-first has no effect without --exposure-bias"),
        (GenerateConfig, "--greedy --top-k 5", "--top-k 5 has no effect beside --greedy"),
        (CacheConfig, "--top-k 5", "--top-k 5 has no effect without --cache-kind topk"),
        (CacheConfig, "--top-k 5 --cache-kind topk", ""),
    ],
)
def test_a_flag_without_effect_is_told(kind, flags, remark, capsys):
    parse([*COMMANDS[kind], *flags.split()], kind)
    assert capsys.readouterr().err == (f"note: {remark}\n" if remark else "")


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("save: ~/run\ntrain_data: ~/train.jsonl\nprompt_init_text: ~ is no path here\n")
    config = parse(["--method", "promptkd", "--model", "m", "--teacher-model", "t", "--train-iters", "3", "--config", "~/run.yaml", "--valid-data=~/v.jsonl"])
    paths = (config.output.save, config.data.train_data, config.data.valid_data)
    assert paths == tuple(f"{tmp_path}/{name}" for name in ("run", "train.jsonl", "v.jsonl"))
    assert config.promptkd.prompt_init_text == "~ is no path here"
    evaluation = parse(["--model=~/m", "--data", "a=~/a.jsonl", "~/b.jsonl", "c~d"], EvaluateConfig)
    assert (evaluation.model, evaluation.data) == (f"{tmp_path}/m", (f"a={tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl", "c~d"))
    flags = [(line, value) for kind in COMMANDS for line, value in zip(kind().flags(), kind().flat().values())]
    text = [line.name for line, value in flags if isinstance(value, (str, tuple))]
    paths = {line.name for line, _ in flags if line.metadata.get("path")}
    words = {"method", "dtype", "lr_decay_style", "kd_objective", "prompt_init", "prompt_init_text", "teacher_kld_type", "base_kld_type"}
    words |= {"reference_behaviour", "seeds", "preset", "baseline", "measure", "hidden_loss", "hidden_layers", "teacher_prompt_field", "teacher_field", "teacher_quantize", "cache_kind", "optimizer", "rollout_engine", "priming_objective", "gsm8k_rule", "exact_match_rule", "rouge_tokenizer", "exit_signal", "resume", "on_nonfinite", "eval_decoding", "keep_best", "peft", "lora_target_modules", "wandb_project", "wandb_name"}
    assert set(text) == words | paths, "a flag that may be a path says so"


@pytest.mark.parametrize(
    "text, message",
    [
        (b"lr: 2024-13-45\n", r"not YAML \(month must be in 1..12\); write one `flag-name: value` a line"),
        (b"lr: \xff\n", r"byte 4 is not UTF-8; convert the file to UTF-8"),
        (b"[" * 1500, r"not YAML"),
        (b"learning_rat: 3\n", r"unknown key 'learning_rat'; --help"),
        (b"max_lenght: 3\n", r"unknown key 'max_lenght'; did you mean max_length\? --help lists the flags"),
    ],
)
def test_a_broken_yaml_file_is_one_line(tmp_path, text, message):
    (tmp_path / "run.yaml").write_bytes(text)
    with pytest.raises(UserError, match=rf"--config \S+run.yaml: {message}") as error:
        from_yaml(tmp_path / "run.yaml")
    assert "\n" not in str(error.value)


def test_the_divergences_of_the_flag_are_those_that_the_losses_know():
    assert set(WORDS) == set(OBJECTIVES)
