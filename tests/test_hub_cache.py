"""A model by its name on the hub: the cache's snapshot, whose files are links to blobs, as huggingface_hub lays it out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_trainer import command, inputs, numbers, run  # noqa: F401  a fixture

from megakd.checkpointing.fingerprint import checksum, model_files
from megakd.checkpointing.import_hf import hf_to_native
from megakd.checkpointing.model_folder import ModelFolder
from megakd.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, name: str, folder: Path) -> Path:
    """`folder` as `hf download name` would leave it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for place in (snapshot, blobs, repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_run_takes_its_models_by_name_or_as_the_snapshot_lies(inputs, cache):  # noqa: F811
    for name in ("student", "teacher"):
        snapshot = cached(cache, f"org/{name}", inputs / name)
    run_distributed(run, 2, command(inputs, "by-path", "kd"), tp=2)
    run_distributed(run, 2, command(inputs, "by-name", "kd", **{"model": "org/student", "teacher-model": snapshot}), tp=2)
    assert numbers(inputs / "by-path") == numbers(inputs / "by-name")
    exported = inputs / "by-name" / "hf"
    assert not [file for file in exported.iterdir() if file.is_symlink()], "an export stands alone"
    assert load_file(exported / "model.safetensors").keys() == load_file(inputs / "by-path" / "hf" / "model.safetensors").keys()


def test_the_tool_and_checksums_take_a_name_too(inputs, cache, tmp_path):  # noqa: F811
    snapshot = cached(cache, "org/student", inputs / "student")
    native = hf_to_native(Path("org/student"), tmp_path / "native", tp=1, pp=1)
    assert not [file for file in (native / "huggingface").iterdir() if file.is_symlink()]
    assert checksum(model_files(Path("org/student")), whole=False) == checksum(model_files(snapshot), whole=False)


def test_an_adapters_base_may_be_in_the_cache(inputs, cache, tmp_path):  # noqa: F811
    cached(cache, "org/student", inputs / "student")
    adapter, name = tmp_path / "adapter", "base_model.model.transformer.h.0.attn.c_attn"
    adapter.mkdir()
    weights = load_file(inputs / "student" / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]  # Conv1D: [in, out]
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/student", "r": 1, "lora_alpha": 1, "fan_in_fan_out": True})
    )
    factors = {f"{name}.lora_A.weight": weights.new_ones(1, weights.shape[0]), f"{name}.lora_B.weight": weights.new_ones(weights.shape[1], 1)}
    save_file(factors, adapter / "adapter_model.safetensors")
    read = ModelFolder.open(adapter).source.read("transformer.h.0.attn.c_attn.weight", (slice(None), slice(None)))
    assert read.equal(weights + 1)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/other", "r": 1, "lora_alpha": 1}')
    with pytest.raises(UserError, match=r"base_model_name_or_path org/other: no such folder, .* fetch it with `hf download org/other`"):
        ModelFolder.open(adapter)


@pytest.mark.parametrize("name", ["org/absent", "runs/no-such-run"])
def test_what_is_not_there_is_told_with_the_command_that_fetches_it(cache, name):
    message = rf"--teacher-model {name}: no such folder, and no such model in the hub's cache {cache}; give a folder, .* `hf download {name}`"
    with pytest.raises(UserError, match=message):
        ModelFolder.open(name, flag="--teacher-model")


@pytest.mark.parametrize("path", ["/no/such/folder", "./absent", "a/b/c", "absent", "two words/x"])
def test_what_is_no_name_on_the_hub_is_a_folder(cache, path):
    with pytest.raises(UserError, match=r"no such folder; give a Hugging Face folder or a native checkpoint"):
        ModelFolder.open(path)


def test_a_folder_of_that_name_is_taken_before_the_cache(inputs, cache, tmp_path, monkeypatch):  # noqa: F811
    cached(cache, "org/student", inputs / "teacher")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "student").symlink_to(inputs / "student")
    monkeypatch.chdir(tmp_path)
    assert ModelFolder.open("org/student").hf_folder == Path("org/student")


def test_a_base_whose_name_is_no_path_is_told(tmp_path):
    name = "9" * 400
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": int(name), "r": 1, "lora_alpha": 1}))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"base_model_name_or_path {name}, which is no folder here; write the base model's folder there"):
        ModelFolder.open(tmp_path)
