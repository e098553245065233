"""Hugging Face folder to native checkpoint, to another layout, and back: the same bits, in memory for a few blocks."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from test_models import batches
from tiny import tiny_config, tiny_folder, tiny_model
from transformers import AutoModelForCausalLM

from megakd.checkpointing import ModelFolder, NativeCheckpoint, export_to_hf, read_latest
from megakd.checkpointing.import_hf import hf_to_native
from megakd.checkpointing.reshard import reshard
from megakd.errors import UserError
from megakd.models.model_provider import build_model, padded_vocab_size
from megakd.schedules import forward_only

TOOLS = Path(__file__).parents[1] / "checkpoint_tools"
VARIANTS = {
    "gpt2": {"family": "gpt2"},
    "gpt2, own head": {"family": "gpt2", "tie_word_embeddings": False},
    "opt": {"family": "opt"},
    "opt-350m": {"family": "opt", "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "galactica": {"family": "opt", "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "llama": {"family": "llama"},
    "llama, tied": {"family": "llama", "tie_word_embeddings": True},
    "llama, one key/value head": {"family": "llama", "num_key_value_heads": 1},
    "llama, biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, biases of attention alone": {"family": "llama", "attention_bias": True},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "attention_bias": True},
    "qwen3, tied": {"family": "qwen3", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "mistral": {"family": "mistral", "sliding_window": 5},
    "gemma3": {"family": "gemma3_text"},
    "qwen3-moe": {"family": "qwen3_moe", "num_key_value_heads": 1},
    "smollm3": {"family": "smollm3", "no_rope_layer_interval": 2, "attention_bias": True, "tie_word_embeddings": True},
}
TOKENIZER = {"tokenizer.json": "{}", "tokenizer_config.json": '{"model_max_length": 64}', "chat_template.jinja": "{{ messages }}"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {name: tiny_folder(root / str(i), **spec) for i, (name, spec) in enumerate(VARIANTS.items())}
    for folder in made.values():
        for name, text in TOKENIZER.items():
            (folder / name).write_text(text)
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_over_two_layouts_gives_the_same_folder(folders, tmp_path, name):
    hf_to_native(folders[name], tmp_path / "mp", tp=2, pp=2)
    reshard(tmp_path / "mp", tmp_path / "mp2", tp=1, pp=4)
    out = export_to_hf(tmp_path / "mp2", tmp_path / "hf")
    assert_same_bits(weights(out), weights(folders[name]))
    for file in ["config.json", "generation_config.json", *TOKENIZER]:
        assert (out / file).read_bytes() == (folders[name] / file).read_bytes()
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    report = json.loads((out / "megakd_export.json").read_text())
    assert report["checked"]["max_difference"] == 0.0 and set(report["sha256"]) == {"config.json", "model.safetensors"}
    assert report["layout"] == {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 4, "data_parallel_size": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_shards_and_names_without_prefix(tmp_path, dtype):
    model = tiny_model(tiny_config("gpt2", layers=2)).to(dtype)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    whole = weights(tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    short = tmp_path / "short"
    shutil.copytree(tmp_path / "hf", short, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    save_file({name.removeprefix("transformer."): tensor for name, tensor in whole.items()}, short / "model.safetensors")
    for source in (tmp_path / "hf", short):
        hf_to_native(source, tmp_path / "mp", tp=4, pp=1, force=True)
        out = export_to_hf(tmp_path / "mp", tmp_path / "out", max_shard_size=100_000)
        assert_same_bits(weights(out), whole)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys() and index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == dtype and all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters()))


def test_long_tensors_travel_in_many_blocks(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("megakd.checkpointing.blocks.BLOCK_BYTES", 4000)
    for name in ("gpt2", "opt", "llama, one key/value head"):
        hf_to_native(folders[name], tmp_path / "mp", tp=4, pp=1, force=True)
        reshard(tmp_path / "mp", tmp_path / "mp2", tp=2, pp=3, force=True)
        assert_same_bits(weights(export_to_hf(tmp_path / "mp2", tmp_path / "hf")), weights(folders[name]))


def build(layout, folder: Path):
    source = ModelFolder.open(folder)
    return build_model(
        source.config, layout, padded_vocab_size=padded_vocab_size([source.config.vocab_size], layout.tp_size)
    ), source


def megatron_loads_what_the_tool_wrote(layout, pairs):
    """Once by megatron-core's own load, once rank by rank; both against the Hugging Face folder."""
    for folder, root in pairs:
        (expected, source), (ours, native) = build(layout, folder), build(layout, root)
        source.load_into(expected)
        native.load_into(ours)
        theirs, _ = build(layout, folder)
        state = theirs.sharded_state_dict(metadata={"dp_cp_group": layout.groups.dp_cp})
        theirs.load_state_dict(dist_checkpointing.load(state, str(NativeCheckpoint(root).folder)))
        for (name, a), b, c in zip(expected.named_parameters(), ours.parameters(), theirs.parameters()):
            assert torch.equal(a, b) and torch.equal(a, c), name
        for a, b in zip(forward_only(expected, batches()), forward_only(theirs, batches())):
            assert torch.equal(a, b)


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
def test_the_model_reads_a_converted_checkpoint_at_every_layout(folders, tmp_path, tp, pp):
    pairs = [(folder, tmp_path / str(i)) for i, folder in enumerate(folders.values())]
    for folder, root in pairs:
        hf_to_native(folder, root, tp=2, pp=2, verify=False)
    run_distributed(megatron_loads_what_the_tool_wrote, tp * pp, pairs, tp=tp, pp=pp)


def test_what_a_native_checkpoint_says_about_itself(folders, tmp_path):
    folder = hf_to_native(folders["opt"], tmp_path / "mp", tp=2, pp=2)
    assert read_latest(tmp_path / "mp") == 0 and folder.name == "iter_0000000"
    description = json.loads((folder / "megakd_checkpoint.json").read_text())
    assert description["vocab_size"] == 97 and description["padded_vocab_size"] == 128 and description["format_version"] == 2
    assert description["versions"].keys() == {"megakd", "torch", "megatron-core", "transformers"}
    names = {path.name for path in folder.iterdir()}
    assert names >= {"metadata.json", ".metadata", "common.pt", "huggingface", *(f"__{rank}_0.distcp" for rank in range(4))}
    hf_files = {"config.json", "generation_config.json", "skipped_rows.safetensors", *TOKENIZER}
    assert {path.name for path in (folder / "huggingface").iterdir()} == hf_files


# ---- the command line


def tool(name: str, *args, python: str = sys.executable) -> subprocess.CompletedProcess:
    return subprocess.run([python, str(TOOLS / name), *map(str, args)], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["hf_to_mp.py", "mp_to_hf.py", "reshard.py"])
def test_help_is_there_at_once(name):
    start = time.perf_counter()
    answer = tool(name, "--help")
    assert answer.returncode == 0 and "--save" in answer.stdout and "folders:" in answer.stdout
    assert time.perf_counter() - start < 1


def test_the_three_tools_and_other_projects_spellings(folders, python, tmp_path):
    commands = [
        (
            "hf_to_mp.py",
            "--input_path",
            folders["gpt2"],
            "--save-dir",
            tmp_path / "mp",
            "--target_mp_size=2",
            "--model_type",
            "gpt2",
        ),
        (
            "reshard.py",
            "--load-dir",
            tmp_path / "mp",
            "--save",
            tmp_path / "mp2",
            "--tp",
            1,
            "--target-pipeline-parallel-size",
            4,
        ),
        ("mp_to_hf.py", "--load", tmp_path / "mp2", "--iteration", 0, "--save", tmp_path / "hf", "--max-shard-size", "1GB"),
    ]
    for command in commands:
        done = tool(*command, python=python)
        assert done.returncode == 0 and done.stdout.startswith("wrote "), done.stderr
    assert NativeCheckpoint(tmp_path / "mp").description.layout["tensor_model_parallel_size"] == 2
    assert_same_bits(weights(tmp_path / "hf"), weights(folders["gpt2"]))


def test_a_wrong_flag_is_one_line():
    answer = tool("reshard.py", "--load", "a", "--save", "b", "--tp", "two")
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "argument --tensor-model-parallel-size: 'two' is not a positive number" in answer.stderr


def test_tensors_that_the_model_does_not_have_are_named(folders, tmp_path, capsys):
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "hf"))
    extra = {"v_head.weight": torch.zeros(3), "transformer.h.0.attn.masked_bias": torch.zeros(1)}
    save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    hf_to_native(folder, tmp_path / "mp", tp=1, pp=1)
    assert f"note: --model {folder}: no part of a gpt2 model; left out: v_head.weight\n" in capsys.readouterr().err


def truncated(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 10)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")


def wrong_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))


def mixed_dtypes(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].half()
    save_file(tensors, folder / "model.safetensors")


def other_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "phi"}))


BROKEN = [
    (truncated, {}, r"model\.safetensors: [\d,]+ bytes, truncated or damaged \(.*\); copy or download"),
    (pickled, {}, r"pytorch_model\.bin: PyTorch's format of before version 1\.6, or damaged; load it with transformers where you trust it"),
    (without_a_tensor, {}, r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing"),
    (wrong_vocabulary, {}, r"has shape \(97, 64\), but config\.json asks for \(90, 64\)"),
    (mixed_dtypes, {}, r"up_proj\.weight is stored as F16, F32; save the model with one of"),
    (other_family, {}, r"model_type 'phi' is not supported; use one of gemma3_text, gpt2, llama,"),
    (lambda folder: None, {"tp": 3}, r"--tensor-model-parallel-size 3 does not divide the 4 attention heads"),
    (lambda folder: None, {"pp": 5}, r"--pipeline-model-parallel-size 5 is more than the 4 layers"),
    (shutil.rmtree, {}, r"--model .*: no such folder"),
]


@pytest.mark.parametrize("breaks, layout, message", BROKEN)
def test_bad_input_is_one_line_and_leaves_nothing_behind(folders, tmp_path, breaks, layout, message):
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "hf"))
    breaks(folder)
    with pytest.raises(ValueError, match=message) as error:
        hf_to_native(folder, tmp_path / "deep" / "mp", **{"tp": 1, "pp": 1} | layout)
    assert "\n" not in str(error.value) and not (tmp_path / "deep").exists()


def test_a_verification_that_fails_leaves_nothing_behind(folders, tmp_path, monkeypatch):
    hf_to_native(folders["gpt2"], tmp_path / "mp", tp=1, pp=1)
    monkeypatch.setattr(
        "megakd.checkpointing.torch_dist_writer.torch.save", lambda value, file: save_with_a_wrong_bit(value, file)
    )
    with pytest.raises(
        UserError, match=r"verification: transformer\.h\.0\.ln_1\.weight differs from its source; nothing was written"
    ):
        hf_to_native(folders["gpt2"], tmp_path / "new", tp=1, pp=1)
    monkeypatch.undo()
    monkeypatch.setattr(
        "megakd.checkpointing.export_hf.HuggingFaceView.read",
        lambda self, name, index: torch.zeros([s.stop - s.start for s in index]),
    )
    with pytest.raises(UserError, match=r"verification: .* differs from its source"):
        export_to_hf(tmp_path / "mp", tmp_path / "hf")
    assert {path.name for path in tmp_path.iterdir()} == {"mp"}


def save_with_a_wrong_bit(value, file, save=torch.save):
    if isinstance(value, torch.Tensor) and value.shape == (1, 64) and not save_with_a_wrong_bit.done:
        save_with_a_wrong_bit.done = True
        value = -value
    save(value, file)


save_with_a_wrong_bit.done = False


def test_what_is_there_is_replaced_by_force_only(folders, tmp_path):
    convert = lambda **options: hf_to_native(folders["gpt2"], tmp_path / "mp", tp=1, pp=1, **options)
    convert()
    with pytest.raises(ValueError, match=r"--save .*: exists and is not empty; give another folder, or --force to replace it"):
        convert()
    convert(force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds something else than an export of megakd, which --force does not replace"):
        export_to_hf(tmp_path / "mp", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert not list((tmp_path / "mp").glob(".*"))


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["reshard.py", "--load-dir=~/native", "--save", "a~b"])
    args = importlib.import_module("reshard").parser().parse()
    assert (args.load, args.save) == (Path("/home/me/native"), Path("a~b"))


# ---- memory

PEAK_OF_A_CONVERSION = """
import sys, threading, time
from pathlib import Path
import torch
from megakd.checkpointing.import_hf import hf_to_native
from megakd.checkpointing.export_hf import export_to_hf
from megakd.checkpointing.reshard import reshard
from megakd.models.hf_checkpoint import HFCheckpoint

torch.set_num_threads(1)
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
def watch():
    while running:
        seen.append(resident()); time.sleep(0.0005)
root = Path(sys.argv[1])
hf_to_native(root / "tiny", root / "warm", tp=1, pp=1)  # what is imported late is imported now
export_to_hf(root / "warm", root / "warm-hf")
for convert in (
    lambda: hf_to_native(root / "hf", root / "mp", tp=1, pp=1),
    lambda: reshard(root / "mp", root / "mp2", tp=2, pp=1),
    lambda: export_to_hf(root / "mp2", root / "out"),
):
    before, seen, running = resident(), [], True
    thread = threading.Thread(target=watch); thread.start()
    start = time.perf_counter(); convert(); took = time.perf_counter() - start
    running = False; thread.join()
    print(max(seen) - before, round(took, 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_under_one_and_a_half_of_the_largest_tensor(python, tmp_path):
    tiny_model(tiny_config("gpt2", layers=1, hidden=256, vocab_size=200_003)).save_pretrained(tmp_path / "hf")
    tiny_folder(tmp_path / "tiny", "gpt2")
    largest = 200_003 * 256 * 4
    done = subprocess.run(
        [python, "-c", PEAK_OF_A_CONVERSION, str(tmp_path)], capture_output=True, text=True, cwd=TOOLS.parent
    )
    assert done.returncode == 0, done.stderr
    peaks = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(peaks) == 3 and all(peak < 1.5 * largest for peak in peaks), done.stdout
