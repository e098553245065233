"""pytorch_model.bin as models were published: read as safetensors are, tensor by tensor, and never executed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file
from test_trainer import command, inputs, numbers, run  # noqa: F401 - a fixture
from tiny import tiny_folder

from megakd.checkpointing import ModelFolder
from megakd.checkpointing.import_hf import hf_to_native
from megakd.errors import UserError
from megakd.models.pytorch_file import tensors_of

GPT2_BUFFERS = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64).tril() for i in range(4)} | {
    f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(4)
}


def published(folder: Path, family: str) -> Path:
    """The folder with its weights as the hub has them: facebook/opt-1.3b under `decoder.`, gpt2 without a prefix and with its masks."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    prefix = {"gpt2": "transformer.", "opt": "model."}[family]
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    torch.save(tensors | (GPT2_BUFFERS if family == "gpt2" else {}), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    "family, fields",
    [("gpt2", {}), ("opt", {}), pytest.param("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}, id="opt-350m")],
)
def test_a_published_folder_is_read_converted_and_trained_as_its_safetensors_are(inputs, tmp_path, family, fields):  # noqa: F811
    safe = tiny_folder(tmp_path / "safe", family, **fields)
    folder = published(tiny_folder(tmp_path / "hf", family, **fields), family)
    ours, theirs = ModelFolder.open(folder).source, ModelFolder.open(safe).source
    for name in load_file(safe / "model.safetensors"):
        index = tuple(slice(1, size - 1) for size in theirs.shape(name))
        assert torch.equal(ours.read(name, index), theirs.read(name, index)), name
    for source, save in ((folder, "from-bin"), (safe, "from-safe")):
        hf_to_native(source, tmp_path / save, tp=2, pp=1)
    one, other = (ModelFolder.open(tmp_path / save).source for save in ("from-bin", "from-safe"))
    for name in one.names:
        whole = tuple(slice(0, size) for size in one.shape(name))
        assert torch.equal(one.read(name, whole), other.read(name, whole)), name
    if family == "gpt2":
        again = shutil.copytree(inputs / "student", inputs / "published")
        words = command(inputs, "from-bin", "sft", **{"tensor-model-parallel-size": 2, "model": published(again, family)})
        run_distributed(run, 2, words)
        run_distributed(run, 2, command(inputs, "from-safe", "sft", **{"tensor-model-parallel-size": 2}))
        assert numbers(inputs / "from-bin") == numbers(inputs / "from-safe")


def test_files_named_by_an_index_are_read_and_a_slice_is_a_view_of_the_file(tmp_path):
    folder = tiny_folder(tmp_path / "hf", "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in parts.items():
        torch.save({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    source = ModelFolder.open(folder).source
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name, tuple(slice(0, size) for size in tensor.shape)), tensor)
    read = source.read("lm_head.weight", (slice(2, 4), slice(None)))
    whole = tensors_of(folder / index["weight_map"]["lm_head.weight"])["lm_head.weight"]
    assert read.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(UserError, match=r"holds pytorch_model-00001-of-00002.bin and 1 more, but no pytorch_model.bin.index.json"):
        ModelFolder.open(folder)


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("beside_tensors", [True, False])
def test_what_a_malicious_file_would_do_is_not_done(tmp_path, beside_tensors):
    folder, sprung = tiny_folder(tmp_path / "hf", "gpt2"), tmp_path / "sprung"
    tensors = load_file(folder / "model.safetensors") if beside_tensors else {}
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"trap": Trap(sprung)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: damaged, or a pickle of more than tensors, which is not executed") as raised:
        ModelFolder.open(folder)
    assert "\n" not in str(raised.value) and not sprung.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert sprung.exists(), "the trap works, where it is let"


@pytest.mark.parametrize("kind", ["a bare pickle", "torch before 1.6", "no dictionary", "cut off"])
def test_files_that_are_no_dictionary_of_tensors_say_so(tmp_path, kind):
    folder = tiny_folder(tmp_path / "hf", "gpt2")
    tensors, file = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    if kind == "a bare pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif kind == "torch before 1.6":
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    elif kind == "no dictionary":
        torch.save([torch.ones(2)], file)
    else:
        torch.save(tensors, file)
        file.write_bytes(file.read_bytes()[:-2000])
    says = "holds no dictionary of tensors by name" if kind == "no dictionary" else "PyTorch's format of before version 1.6, or damaged"
    with pytest.raises(UserError, match=rf"pytorch_model.bin: {says}; load it with transformers where you trust it"):
        ModelFolder.open(folder)


def test_a_file_is_mapped_and_not_read(tmp_path):
    folder = published(tiny_folder(tmp_path / "hf", "gpt2"), "gpt2")
    tensors = tensors_of(folder / "pytorch_model.bin")  # alive, and so is the mapping
    assert tensors and str(folder / "pytorch_model.bin") in Path("/proc/self/maps").read_text()
