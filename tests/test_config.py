"""Flags, the YAML file under them, and a help that needs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megakd.config import Config, EvaluateConfig, GenerateConfig, flag_name, parse

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


@pytest.mark.parametrize("kind", [Config, EvaluateConfig, GenerateConfig])
def test_a_saved_configuration_is_read_back_as_it_was(tmp_path, kind):
    config, file = kind(), tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.flat(), sort_keys=False))
    from megakd.config import from_yaml

    assert from_yaml(file, kind) == config


def test_no_two_flags_share_a_name():
    config = Config()
    groups = [vars(value) for value in vars(config).values() if hasattr(value, "__dataclass_fields__")]
    assert len(config.flat()) == 1 + sum(map(len, groups))


@pytest.mark.parametrize("script, kind", [("pretrain_kd", Config), ("evaluate", EvaluateConfig), ("generate", GenerateConfig)])
def test_help_names_every_flag_without_torch_or_torchrun(script, kind):
    code = f"import runpy, sys; sys.argv = ['{script}.py', '--help']\ntry: runpy.run_path('{ROOT}/scripts/{script}.py', run_name='__main__')\n"
    code += "except SystemExit: pass\nsys.stderr.write(str('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"})
    assert done.stderr == "False"
    assert not [name for name in kind().flat() if flag_name(name) not in done.stdout]
