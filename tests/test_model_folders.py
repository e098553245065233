"""Model folders as people have them: what transformers makes of each is what we make of it, and what cannot be run is told in one line."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file, save_file
from tasks import make_rows
from test_models import batches, difference
from tiny import tiny_config, tiny_folder, tiny_model
from train_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from megakd.checkpointing import ModelFolder, export_to_hf
from megakd.checkpointing.checksums import checksums, write_checksums
from megakd.checkpointing.import_hf import hf_to_native
from megakd.checkpointing.reshard import reshard
from megakd.data.chat import Chat
from megakd.data.tokenizer import check_same_tokenizer, load_tokenizer
from megakd.errors import UserError
from megakd.loading import check_tokenizers
from megakd.models.model_provider import build_model, padded_vocab_size
from megakd.models.quantized import block_shape
from megakd.schedules import forward_only

FAMILIES = ("gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma3_text", "qwen3_moe")
EMBEDDING = {"gpt2": "transformer.wte.weight", "opt": "model.decoder.embed_tokens.weight"}
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """A tied tiny model of each family; nobody changes these."""
    root = tmp_path_factory.mktemp("originals")
    return {family: tiny_folder(root / family, family, layers=2, tie_word_embeddings=True) for family in FAMILIES}


@pytest.fixture
def copy(originals, tmp_path):
    """A copy of a family's folder, to be changed."""

    def copied(family: str, name: str = "hf") -> Path:
        return Path(shutil.copytree(originals[family], tmp_path / name))

    return copied


@pytest.fixture
def notes(capsys):
    """What was told since the last call."""
    return lambda: [line.removeprefix("note: ") for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]


def change_weights(folder: Path, change) -> dict[str, torch.Tensor]:
    """`change` gets the tensors and changes them in place; returns what was written."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def change_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def worst_differences(layout, pairs):
    """Largest difference of our logits on a folder to transformers' on another, for every (ours, theirs)."""
    worst = []
    for ours, theirs in pairs:
        folder = ModelFolder.open(ours)
        width = padded_vocab_size([folder.config.vocab_size], layout.tp_size)
        model = build_model(folder.config, layout, padded_vocab_size=width).eval()
        folder.load_into(model)
        reference = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
        hidden = forward_only(model, batches())
        if layout.is_last_stage:
            worst.append(max(difference(model, h, batch, reference, layout) for h, batch in zip(hidden, batches())))
    return worst


def assert_equal_logits(*pairs, tp: int = 1, pp: int = 1) -> None:
    for worst in run_distributed(worst_differences, tp * pp, pairs, tp=tp, pp=pp):
        assert all(value <= 2e-6 for value in worst), worst


def round_trip(folder: Path, root: Path) -> Path:
    """Folder → native → another layout → folder, verified on each way."""
    hf_to_native(folder, root / "mp", tp=2, pp=2, force=True)
    reshard(root / "mp", root / "mp2", tp=1, pp=1, force=True)
    return export_to_hf(root / "mp2", root / "back")


def refused_everywhere(folder: Path, root: Path, message: str) -> None:
    """By training, evaluation and generation, which open a folder alike, and by the tool; nothing is written."""
    convert = partial(hf_to_native, folder, root / "never", tp=1, pp=1)
    for opens in (lambda: ModelFolder.open(folder), convert, partial(convert, verify=False)):
        with pytest.raises(UserError, match=message) as error:
            opens()
        assert "\n" not in str(error.value) and str(folder) in str(error.value), error.value
    assert not (root / "never").exists()


# ---- the head


def add_another_head(tensors) -> None:
    tensors[HEAD] = 0.05 * torch.randn(97, 64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_config_beside_another_head_keeps_both_as_transformers_does(family, copy, tmp_path, notes):
    folder = copy(family)
    tensors = change_weights(folder, add_another_head)
    back = round_trip(folder, tmp_path)
    (told,) = notes()
    assert told.endswith("both are used, as transformers does")
    written = load_file(back / "model.safetensors")
    assert written.keys() == tensors.keys() and all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert json.loads((back / "config.json").read_text())["tie_word_embeddings"] is False
    assert_equal_logits((folder, folder), (tmp_path / "mp", folder), (back, folder), (folder, back))


def test_an_own_head_under_a_tied_config_is_used_at_every_layout(copy):
    folder = copy("llama")
    change_weights(folder, add_another_head)
    assert_equal_logits((folder, folder), tp=2)
    assert_equal_logits((folder, folder), pp=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_model_that_holds_its_head_alone_is_tied_the_other_way_round(family, copy, originals, tmp_path):
    folder, words = copy(family), EMBEDDING.get(family, "model.embed_tokens.weight")
    change_weights(folder, lambda t: t.update({HEAD: t.pop(words)}))
    back = round_trip(folder, tmp_path)
    assert load_file(back / "model.safetensors").keys() == load_file(originals[family] / "model.safetensors").keys()
    assert_equal_logits((folder, folder), (back, originals[family]), (folder, back))


def test_a_copy_of_a_tied_head_stays_tied_and_is_not_told(copy, tmp_path, notes):
    folder = copy("gpt2")
    change_weights(folder, lambda t: t.update({HEAD: t["transformer.wte.weight"].clone()}))
    back = round_trip(folder, tmp_path)
    assert not notes() and (back / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert HEAD not in load_file(back / "model.safetensors")
    assert ModelFolder.open(folder).config.tie_word_embeddings


def test_an_untied_model_without_its_head_says_how_to_tie_it(copy, tmp_path):
    folder = copy("llama")
    change_config(folder, tie_word_embeddings=False)
    refused_everywhere(folder, tmp_path, r"'lm_head.weight' is missing; set tie_word_embeddings to true in config.json if")


# ---- shapes and rows


@pytest.mark.parametrize("vocab_size", [90, 200])
def test_rows_of_the_vocabulary_are_those_of_the_config(vocab_size, copy, tmp_path):
    folder = copy("llama")
    change_config(folder, vocab_size=vocab_size)
    said = rf"embed_tokens.weight has shape \(97, 64\), but config.json asks for \({vocab_size}, 64\); set vocab_size to what the weights have"
    refused_everywhere(folder, tmp_path, said)


SHAPES = [
    ("llama", {"intermediate_size": 96}, r"gate_proj.weight has shape \(112, 64\), but config.json asks for \(96, 64\); give the config"),
    ("llama", {"num_key_value_heads": 1}, r"k_proj.weight has shape \(32, 64\), but config.json asks for \(16, 64\)"),
    ("llama", {"head_dim": 8}, r"q_proj.weight has shape \(64, 64\), but config.json asks for \(32, 64\)"),
    ("llama", {"num_key_value_heads": 3}, r"config.json says 4 attention heads for 3 key/value heads"),
    ("gpt2", {"n_positions": 32}, r"wpe.weight has shape \(64, 64\), but config.json asks for \(32, 64\)"),
    ("gpt2", {"n_inner": 128}, r"c_fc.weight has shape \(64, 256\), but config.json asks for \(64, 128\)"),
    ("opt", {"max_position_embeddings": 60}, r"embed_positions.weight has shape \(66, 64\), but config.json asks for \(62, 64\)"),
    ("opt", {"ffn_dim": 64}, r"fc1.weight has shape \(128, 64\), but config.json asks for \(64, 64\)"),
    ("qwen2", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, r"tensor 'model.layers.2.\S+' is missing; the folder is incomplete"),
]  # fmt: skip


@pytest.mark.parametrize("family, fields, message", SHAPES)
def test_every_tensor_has_the_shape_that_the_config_asks_for(family, fields, message, copy, tmp_path):
    folder = copy(family)
    change_config(folder, **fields)
    refused_everywhere(folder, tmp_path, message)


def test_a_native_checkpoint_is_what_its_config_says(originals, tmp_path):
    made = hf_to_native(originals["llama"], tmp_path / "mp", tp=1, pp=1)

    def changed(**fields):
        change_config(made / "huggingface", **fields)
        write_checksums(made, checksums(made))  # by somebody who knows of them

    changed(intermediate_size=96)
    for opens in (
        lambda: ModelFolder.open(tmp_path / "mp"),
        lambda: export_to_hf(tmp_path / "mp", tmp_path / "hf"),
        lambda: reshard(tmp_path / "mp", tmp_path / "mp2", tp=1, pp=1),
    ):
        with pytest.raises(UserError, match=r"linear_fc1.weight has shape \(2, 224, 64\), but its config.json asks for \(2, 192, 64\)"):
            opens()
    changed(intermediate_size=112, vocab_size=300)
    with pytest.raises(UserError, match=r"config.json says vocab_size 300, megakd_checkpoint.json says 97"):
        ModelFolder.open(tmp_path / "mp")


# ---- what is left over


def extra_layer(tensors):
    tensors.update({name.replace(".1.", ".2."): tensor.clone() for name, tensor in tensors.items() if ".layers.1." in name})


LEFT_OVER = {
    "LoRA": (
        lambda t: t.update({f"model.layers.{i}.self_attn.q_proj.lora_{x}.weight": torch.ones(2, 64) for i in range(2) for x in "AB"}),
        r"no part of a llama model \(LoRA tensors, which are not merged\); left out: (\S+, ){2}\S+ and 1 more",
    ),
    "layers": (extra_layer, r"no part of a llama model of 2 layers \(layers up to 2 are stored\); left out: (\S+, ){2}\S+ and 6 more"),
    "biases": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        r"no part of a llama model; left out: model.layers.0.self_attn.q_proj.bias",
    ),
}


@pytest.mark.parametrize("name", LEFT_OVER)
def test_what_is_left_out_is_told_in_one_bounded_line_whoever_opens_the_folder(name, copy, tmp_path, notes):
    folder, (change, message) = copy("llama"), LEFT_OVER[name]
    change_weights(folder, change)
    ModelFolder.open(folder)
    hf_to_native(folder, tmp_path / "mp", tp=1, pp=1)
    told = notes()
    assert len(told) == 2 and all(re.fullmatch(rf"--model \S+: {message}", said) for said in told), told
    assert_equal_logits((folder, folder))


def test_only_one_rank_of_many_tells(copy, notes, monkeypatch):
    folder = copy("llama")
    change_weights(folder, lambda t: t.update({"odd.weight": torch.ones(1)}))
    monkeypatch.setenv("RANK", "1")
    ModelFolder.open(folder)
    assert not notes()


def test_buffers_of_older_transformers_are_expected(copy, notes):
    for family, names in {
        "gpt2": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
        "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"),
    }.items():
        folder = copy(family, family)
        change_weights(folder, lambda t, names=names: t.update({name: torch.ones(1) for name in names}))
        ModelFolder.open(folder)
    assert not notes()


def test_verification_counts_every_tensor_of_the_source(copy, tmp_path, monkeypatch):
    folder = copy("llama")
    change_weights(folder, lambda t: t.update({"model.norm.bias": torch.ones(64)}))
    monkeypatch.setattr("megakd.checkpointing.import_hf.inspect", lambda checkpoint: set())
    with pytest.raises(UserError, match=r"verification: model.norm.bias of \S+ is not in the checkpoint; nothing was written"):
        hf_to_native(folder, tmp_path / "mp", tp=1, pp=1)


# ---- files


def test_a_single_file_is_taken_before_an_index_that_was_left_there(copy):
    folder = copy("llama")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert_equal_logits((folder, folder))


def sharded(folder: Path) -> Path:
    model = tiny_model(tiny_config("llama", layers=2))
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder / "model.safetensors.index.json"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
LFS = r"is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"


def lone_shards(folder: Path) -> None:
    sharded(folder).unlink()
    (folder / "training_args.bin").write_bytes(b"pickle")


def hub_cache(folder: Path) -> None:
    inner = folder.parent / "inner"
    folder.rename(inner)
    (folder / "snapshots").mkdir(parents=True)
    (folder / "refs").mkdir()
    inner.rename(folder / "snapshots" / "0a1b2c")


def adapter(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"}))
    save_file({"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


def adapter_with_config(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    adapter(folder)
    (folder / "config.json").write_text(config)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lora_instead_of_weights(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    change_weights(
        folder, lambda t: t.update({f"{name}.base_layer.weight": t.pop(f"{name}.weight"), f"{name}.lora_A.weight": torch.ones(2, 64)})
    )


FILES = {
    "an index that is cut": (lambda f: sharded(f).write_text('{"weight_map": {"a": '), r"index.json: not JSON \(.*\); copy or download it again"),
    "an index without weight_map": (lambda f: sharded(f).write_text('{"metadata": {}}'), r"index.json: has no weight_map from tensors to files; copy or download"),
    "an index of nothing": (lambda f: sharded(f).write_text('{"weight_map": {}}'), r"index.json: has no weight_map"),
    "an index of odd types": (lambda f: sharded(f).write_text('{"weight_map": {"a": 5}}'), r"index.json: has no weight_map"),
    "an index that is a list": (lambda f: sharded(f).write_text("[]"), r"index.json: holds a JSON list where an object is needed"),
    "an index that git left": (lambda f: sharded(f).write_text(POINTER), rf"index.json: {LFS}"),
    "weights that git left": (lambda f: (f / "model.safetensors").write_text(POINTER), rf"model.safetensors: {LFS}"),
    "a config that git left": (lambda f: (f / "config.json").write_text(POINTER), rf"config.json: {LFS}"),
    "a shard that git left": (lambda f: next(sharded(f).parent.glob("model-00002*")).write_text(POINTER), rf"model-00002-of-\d+.safetensors: {LFS}"),
    "a missing shard": (lambda f: next(sharded(f).parent.glob("model-00002*")).unlink(), r"model-00002-of-\d+.safetensors: the index names this file, but it is not there"),
    "an empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), r"model.safetensors: 0 bytes, truncated or damaged"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" + bytes(40)), r"model.safetensors: 41 bytes, truncated or damaged"),
    "shards without an index": (lone_shards, r"holds model-00001-of-\d+.safetensors and \d+ more, but no model.safetensors.index.json .*download it"),
    "a cache of the hub": (hub_cache, r"no config.json; give \S+/snapshots/0a1b2c$"),
    "an adapter": (adapter, r"(hf: base_model_name_or_path org/base: no such folder, .* fetch it with `hf download org/base`|holds an adapter of org/base, not a model; merge)"),
    "an adapter with a config": (adapter_with_config, r"(hf: base_model_name_or_path org/base: no such folder, .* fetch it with `hf download org/base`|holds an adapter of org/base)"),
    "adapted layers": (lora_instead_of_weights, r"'model.layers.0.self_attn.q_proj.weight' is missing beside LoRA tensors; merge them with peft's"),
    "a pickle": (pickled, r"pytorch_model.bin: PyTorch's format of before version 1.6, or damaged; .* give the folder that save_pretrained writes"),
    "another dtype": (lambda f: change_weights(f, lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int64)})), r"model.norm.weight is stored as I64, which is no number here; save the model with one of F64, F32, BF16, F16"),
    "bare FP8": (lambda f: change_weights(f, lambda t: t.update({n: x.to(torch.float8_e4m3fn) for n, x in t.items()})), r"embed_tokens.weight is stored as F8_E4M3, which is no number here"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_used_say_what_they_are_and_what_helps(name, copy, tmp_path):
    folder, (change, message) = copy("llama"), FILES[name]
    change(folder)
    refused_everywhere(folder, tmp_path, message)


def test_an_adapter_beside_whole_weights_is_told(copy, notes):
    folder = copy("llama")
    (folder / "adapter_config.json").write_text("{}")
    ModelFolder.open(folder)
    assert notes() == [
        f"--model {folder}: adapter_config.json lies beside whole weights; the adapter is not applied (peft's merge_and_unload() merges one)"
    ]


def test_a_rope_that_changes_with_a_rows_length_is_read_as_far_as_it_does_not(copy, notes):
    folder = copy("llama")
    change_config(folder, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    ModelFolder.open(folder)
    assert notes() == [
        f"--model {folder}: rope_type 'dynamic' changes its frequencies in rows of more than 64 tokens (max_position_embeddings), which is "
        "as far as it is read here"
    ]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vocab_size": "97"}, r"cannot be read \(.*'vocab_size' expected int, got str"),
        ({"hidden_size": [64]}, r"cannot be read \(.*'hidden_size' expected int, got list"),
        ({"dtype": None, "torch_dtype": "auto"}, r"cannot be read \(module 'torch' has no attribute 'auto'\)"),
        ({"num_attention_heads": 0}, r"cannot be read \(integer modulo by zero\)"),
        ({"num_hidden_layers": -1}, r"config.json says num_hidden_layers -1, which is no positive number"),
        ({"rope_parameters": 5}, r"cannot be read \(.*'rope_parameters'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, r"cannot be run: rope_type 'proportional' is not one of default, linear, .*; use a model whose context"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, r"cannot be read \(.*Missing required keys in `rope_parameters` for 'rope_type'='yarn'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": -1}}, r"config.json says beta_fast -1, which is no positive number; give"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, r"config.json says rope_theta '1e4', which is no positive number; give"),
        ({"rope_parameters": {"rope_type": [], "rope_theta": 1e4}}, r"config.json says rope_type \[\], which is no name; give"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}}, r"config.json says factor 0, which is no positive number; give"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}}, r"weight_block_size \[0, 128\], which is no two positive numbers"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": "128"}}, r"weight_block_size '128', which is no two positive numbers; copy"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu' is not 'silu'; use a model of the family's own activation"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_used_says_so(fields, message, copy, tmp_path):
    folder = copy("llama")
    change_config(folder, **fields)
    if fields.get("dtype", "") is None or fields.get("rope_parameters", "") is None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    refused_everywhere(folder, tmp_path, message)


def test_a_release_of_megatron_lm_is_told_apart_from_our_checkpoints(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(UserError, match=r"--model \S+: is Megatron-LM's own 'release' format, which is not read; give a Hugging Face folder made of it"):
        ModelFolder.open(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(UserError, match=r"holds no iter_0000007 \(there: none\); no other iteration there is whole; give another --model"):
        ModelFolder.open(tmp_path)


# ---- quantised weights


def fp8(codes_of, blocks: tuple[int, int]):
    """A change of weights: every linear layer's weight becomes FP8 codes with a scale a block of `blocks` rows and columns."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            weight = tensors[name]
            tiles = weight.unflatten(0, (-1, min(blocks[0], weight.shape[0]))).unflatten(2, (-1, min(blocks[1], weight.shape[1])))
            scale = tiles.abs().amax((1, 3)) / 448
            codes = (tiles / scale[:, None, :, None]).flatten(0, 1).flatten(1).to(torch.float8_e4m3fn)
            tensors.update(codes_of(name, codes, scale))

    return change


def plain(folder: Path, quantised: Path) -> Path:
    """A copy whose weights transformers' own operation has dequantised, with a config that knows nothing of it."""
    shutil.copytree(quantised, folder)
    operation = Fp8Dequantize(None)

    def dequantised(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            scale = next(tensors.pop(name + end) for end in ("_scale_inv", "_scale") if name + end in tensors)
            scale = scale.reshape(*scale.shape, *[1] * (2 - scale.ndim))
            tensors[name] = operation._dequantize_one(tensors[name], scale, output_dtype=torch.float32)
        for name in [name for name in tensors if name.endswith("_scale")]:
            del tensors[name]

    change_weights(folder, dequantised)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WHOLE = (10**6, 10**6)
QUANTISED = {  # how transformers' fine-grained FP8, plain FP8 with activation scales, and compressed-tensors store weights
    "blocks": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, fp8(lambda n, c, s: {n: c, f"{n}_scale_inv": s}, (16, 16))),
    "one scale a tensor": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        fp8(lambda n, c, s: {n: c, f"{n}_scale": s.view(()), n.replace("weight", "input_scale"): torch.ones(())}, WHOLE),
    ),
    "one scale a row": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
        fp8(lambda n, c, s: {n: c, f"{n}_scale": s}, (1, 10**6)),
    ),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_fp8_weights_are_dequantised_as_transformers_does_and_exported_plain(name, copy, tmp_path, notes):
    folder, (said, change) = copy("llama"), QUANTISED[name]
    change_weights(folder, change)
    change_config(folder, quantization_config=said)
    reference = plain(tmp_path / "plain", folder)
    back = round_trip(folder, tmp_path)
    assert not notes()
    theirs, ours = load_file(reference / "model.safetensors"), load_file(back / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "quantization_config" not in json.loads((back / "config.json").read_text())
    assert_equal_logits((folder, reference), (back, reference))


def test_int8_weights_of_compressed_tensors_are_codes_times_scales(copy):
    folder, name = copy("llama"), "model.layers.0.mlp.up_proj.weight"
    codes, scale = torch.randint(-127, 128, (112, 64), dtype=torch.int8), torch.rand(112, 1)
    change_weights(folder, lambda t: t.update({name: codes, f"{name}_scale": scale}))
    change_config(folder, quantization_config={"quant_method": "compressed-tensors", "format": "int-quantized"})
    source = ModelFolder.open(folder).source
    assert torch.equal(source.read(name, (slice(30, 50), slice(7, None))), (codes.float() * scale)[30:50, 7:])
    for end, beside in {"_zero_point": torch.ones(112, 1, dtype=torch.int8), "_g_idx": torch.arange(64, dtype=torch.int32)}.items():
        change_weights(folder, lambda t, end=end, beside=beside: t.update({f"{name}{end}": beside}))
        with pytest.raises(UserError, match=r"up_proj.weight is stored as I8, which is no number here"):
            ModelFolder.open(folder)
        change_weights(folder, lambda t, end=end: t.pop(f"{name}{end}"))


@pytest.mark.parametrize(
    "shape, scales, said, block",
    [
        ((200, 300), (2, 3), {"weight_block_size": [128, 128]}, (128, 128)),  # the last blocks are cut
        ((200, 300), (2, 3), {}, (128, 128)),
        ((64, 96), (4, 2), {"weight_block_size": [128, 128]}, (16, 48)),
        ((64, 96), (64,), {"weight_block_size": None}, (1, 96)),
        ((64, 96), (64, 1), {}, (1, 96)),
        ((64, 96), (), {}, (128, 128)),
        ((64, 96), (5, 2), {}, None),
    ],
)
def test_how_many_rows_and_columns_share_a_scale(shape, scales, said, block):
    assert block_shape(shape, scales, said) == block


def gptq(tensors):
    weight = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    tensors["model.layers.0.self_attn.q_proj.qweight"] = torch.zeros(8, weight.shape[0], dtype=torch.int32)


def four_bits(tensors):
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)


METHODS = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq, r"quantised by gptq \(4 bits\), which is not read here; give the model that it was made from"),
    "awq": ({"quant_method": "awq", "bits": 4}, gptq, r"quantised by awq \(4 bits\), which is not read here"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, four_bits, r"quantised by bitsandbytes \(4bit\), which is not read here"),
    "packed": ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, gptq, r"quantised by compressed-tensors \(pack-quantized\), which is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_codes_of_other_methods_are_refused_by_the_methods_name(name, copy, tmp_path):
    folder, (said, change, message) = copy("llama"), METHODS[name]
    change_weights(folder, change)
    change_config(folder, quantization_config=said)
    refused_everywhere(folder, tmp_path, message)


def test_plain_weights_under_a_forgotten_quantization_config_are_used_as_they_are(copy, originals, tmp_path, notes):
    folder = copy("llama")
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    back = round_trip(folder, tmp_path)
    assert "config.json says quantised by bitsandbytes (4bit), but the weights are plain numbers" in "".join(notes())
    assert_equal_logits((folder, originals["llama"]), (back, originals["llama"]))


# ---- weights that are no numbers


def load_diverged(layout, folder: Path) -> str:
    opened = ModelFolder.open(folder, flag="--teacher-model")
    model = build_model(opened.config, layout, padded_vocab_size=128)
    try:
        opened.load_into(model)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name, value", [("self_attn.v_proj.weight", math.nan), ("mlp.up_proj.weight", math.inf), ("input_layernorm.weight", -math.inf)])
def test_a_weight_that_is_no_number_is_named_with_its_file_before_it_is_used(name, value, copy, tmp_path, notes):
    folder = copy("llama")
    change_weights(folder, lambda t: t[f"model.layers.1.{name}"].view(-1)[7:8].fill_(value))
    native = hf_to_native(folder, tmp_path / "mp", tp=1, pp=1)
    (told,) = notes()
    assert "model.layers.1." in told and told.endswith("hold NaN or infinite values, which are converted as they are")
    said = f"model.layers.1.{name} holds NaN or infinite values; give weights of before they diverged"
    assert run_distributed(load_diverged, 1, folder) == [f"--teacher-model {folder}/model.safetensors: {said}"]
    assert run_distributed(load_diverged, 1, tmp_path / "mp") == [f"{native}: {said}"]


# ---- biases of attention and of the feed-forward apart


@pytest.mark.parametrize("attention, mlp", [(True, False), (False, True)])
def test_llama_may_have_biases_in_one_half_alone(attention, mlp, tmp_path):
    folder = tiny_folder(tmp_path / "hf", "llama", layers=2, attention_bias=attention, mlp_bias=mlp)
    back = round_trip(folder, tmp_path)
    ours, theirs = load_file(back / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_equal_logits((folder, folder), tp=2)
    assert_equal_logits((folder, folder), (back, folder), pp=2)


# ---- tokenizers


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([row["prompt"] + row["response"] for row in make_rows(64, seed=0)]).save_pretrained(folder)
    return folder


def test_a_pad_token_of_ones_own_has_a_way_out_that_works(tokenizer_folder, tmp_path):
    with_pad = load_tokenizer(tokenizer_folder)
    with_pad.add_special_tokens({"pad_token": "[PAD]"})
    with_pad.save_pretrained(tmp_path / "teacher")
    plain, padded = (load_tokenizer(folder) for folder in (tokenizer_folder, tmp_path / "teacher"))
    for student, teacher, flag in ((plain, padded, "--teacher-model"), (padded, plain, "--model")):
        with pytest.raises(
            UserError, match=rf"'\[PAD\]' for .*only added tokens differ, .*copy the tokenizer files of {tokenizer_folder} into a copy of {flag}"
        ):
            check_same_tokenizer(student, teacher)
    shutil.rmtree(tmp_path / "teacher")
    shutil.copytree(tokenizer_folder, tmp_path / "teacher")
    check_same_tokenizer(plain, load_tokenizer(tmp_path / "teacher"))


def test_equal_ids_that_split_text_otherwise_are_no_matter_of_added_tokens(tokenizer_folder, tmp_path):
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "teacher"))
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"have the same ids but split .* differently; distil between models that share a tokenizer"):
        check_same_tokenizer(load_tokenizer(tokenizer_folder), load_tokenizer(folder))


def newer(folder: Path) -> None:
    fields = json.loads((folder / "tokenizer.json").read_text())
    fields["model"]["type"] = "ByteLatent"
    (folder / "tokenizer.json").write_text(json.dumps(fields))


TOKENIZERS = {
    "of a newer tokenizers": (newer, r"does not load \(data did not match any variant of untagged enum .*written by a newer tokenizers than \d"),
    "cut": (lambda f: os.truncate(f / "tokenizer.json", 300), r"its tokenizer does not load \(.*\).*; copy or download them again"),
    "not an object": (lambda f: (f / "tokenizer.json").write_text("[]"), r"its tokenizer does not load"),
    "that git left": (lambda f: (f / "tokenizer.json").write_text(POINTER), rf"tokenizer.json: {LFS}"),
    "a sentencepiece model that git left": (lambda f: (f / "tokenizer.model").write_text(POINTER), rf"tokenizer.model: {LFS}"),
    "a damaged config": (lambda f: (f / "tokenizer_config.json").write_text("{"), r"tokenizer_config.json: not JSON .*; copy or download it again"),
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_files_that_cannot_be_read_are_named(name, tokenizer_folder, tmp_path):
    folder, (change, message) = Path(shutil.copytree(tokenizer_folder, tmp_path / "hf")), TOKENIZERS[name]
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_chat_templates_of_which_none_is_the_default_are_named(tokenizer_folder):
    tokenizer, turns = load_tokenizer(tokenizer_folder), [{"role": "user", "content": "hi"}]
    tokenizer.chat_template = {"tool_use": "{{ messages }}", "rag": "{{ messages }}"}
    with pytest.raises(UserError, match=rf"{tokenizer_folder}: its chat templates are tool_use, rag, and none is the default; name one"):
        Chat(turns, None, tokenizer, "a.jsonl line 3")


def test_a_student_whose_pad_token_has_no_row_is_told_what_to_do(tokenizer_folder, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder)
    folder = tiny_folder(tmp_path / "student", "gpt2", layers=2, vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"none for '\[PAD\]'; use the tokenizer files that it was trained with .*, or resize_token_embeddings"):
        check_tokenizers(ModelFolder.open(folder), None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    check_tokenizers(ModelFolder.open(folder), None)
