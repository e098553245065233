"""mpN folders as MiniLLM's convert_mp.py writes them: read, trained and converted as the whole model is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file
from test_pytorch_files import Trap
from test_trainer import command, inputs, numbers, run  # noqa: F401  a fixture
from tiny import tiny_folder
from transformers import AutoTokenizer

from megakd.checkpointing.model_folder import ModelFolder
from megakd.errors import UserError

ROOT = Path(__file__).parents[1]
ROWS = {  # what convert_mp.py cuts; all else is whole in every piece
    "opt": ("embed_tokens.weight", "lm_head.weight", *(f"{x}.{kind}" for x in ("q_proj", "k_proj", "v_proj", "fc1") for kind in ("weight", "bias"))),
    "llama": ("embed_tokens.weight", "lm_head.weight", *(f"{x}_proj.weight" for x in ("q", "k", "v", "gate", "up"))),
}
COLUMNS = {"opt": ("out_proj.weight", "fc2.weight"), "llama": ("o_proj.weight", "down_proj.weight")}
ROWS["mistral"], COLUMNS["mistral"] = ROWS["llama"], COLUMNS["llama"]
BUFFER = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}


def cut(folder: Path, family: str, size: int, *, keep: bool = False) -> Path:
    """The folder's model as mp<size>; the head of a tied model lies there too, as state_dict has it."""
    tensors = load_file(folder / "model.safetensors")
    if family == "opt":
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    (folder / f"mp{size}").mkdir()
    for i in range(size):
        piece = dict(BUFFER) if family == "llama" else {}
        for name, tensor in tensors.items():
            axis = 0 if name.endswith(ROWS[family]) else 1 if name.endswith(COLUMNS[family]) else None
            piece[name] = tensor.clone() if axis is None else tensor.chunk(size, axis)[i].clone()
        torch.save(piece, folder / f"mp{size}" / f"pytorch_model_{i}.bin")
    if not keep:
        (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("family, size", [("opt", 2), ("opt", 4), ("llama", 2), ("mistral", 2)])
def test_every_rectangle_of_every_tensor_is_that_of_the_whole(tmp_path, family, size):
    folder = tiny_folder(tmp_path / "hf", family, vocab_size=96)
    tensors = load_file(folder / "model.safetensors")
    source = ModelFolder.open(cut(folder, family, size)).source
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape), name
        for edge in (0, 3):
            index = tuple(slice(edge, length - edge) for length in tensor.shape)
            assert torch.equal(source.read(name, index), tensor[index]), name
        middle = (slice(tensor.shape[0] // size - 1, tensor.shape[0] // size), *(slice(None) for _ in tensor.shape[1:]))
        assert torch.equal(source.read(name, middle), tensor[middle]), name


def test_a_run_learns_the_same_from_pieces_as_from_the_whole(inputs, tmp_path):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(inputs / "student")
    for name in ("whole", "pieces"):
        tiny_folder(tmp_path / name, "opt", layers=2, vocab_size=len(tokenizer) // 4 * 4 + 4)
        tokenizer.save_pretrained(tmp_path / name)
    cut(tmp_path / "pieces", "opt", 4)
    for name in ("whole", "pieces"):
        run_distributed(run, 2, command(inputs, f"from-{name}", "kd", **{"model": tmp_path / name, "teacher-model": tmp_path / name}), tp=2)
    assert numbers(inputs / "from-whole") == numbers(inputs / "from-pieces")


def convert(*words) -> None:
    """hf_to_mp.py with these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "checkpoint_tools")
        patch.setattr(sys, "argv", ["hf_to_mp.py", *map(str, words)])
        import hf_to_mp

        hf_to_mp.run(hf_to_mp.parser(), hf_to_mp.convert)


def test_the_tool_takes_the_flags_of_convert_mp(tmp_path, capsys):
    folder = cut(tiny_folder(tmp_path / "hf", "opt", vocab_size=96), "opt", 4, keep=True)
    whole = load_file(folder / "model.safetensors")
    for i in range(4):  # another model than the safetensors beside it: which of the two is read is seen
        file = folder / "mp4" / f"pytorch_model_{i}.bin"
        torch.save({name: -tensor for name, tensor in torch.load(file).items()}, file)
    words = ["--input_path", folder, "--save", tmp_path / "native", "--model_type", "opt", "--target_mp_size", "2"]
    for size, sign in (("4", -1), ("1", 1)):
        convert(*words, "--source_mp_size", size, "--exist_ok")
        source = ModelFolder.open(tmp_path / "native").source
        for name in source.names:
            index = tuple(slice(0, length) for length in source.shape(name))
            assert torch.equal(source.read(name, index), sign * whole[name]), name
    refused = {
        ("--model_type", "llama2"): f"--model-type llama: config.json of --model {folder} says opt; leave it out",
        ("--source_mp_size", "8"): "mp8/pytorch_model_0.bin is not there, one of the 8 pieces of mp8",
    }
    for more, message in refused.items():
        with pytest.raises(SystemExit):
            convert(*words, *more, "--exist_ok")
        assert message in capsys.readouterr().err


def test_pieces_that_do_not_belong_together_are_told(tmp_path, noted):
    folder = cut(tiny_folder(tmp_path / "hf", "llama", vocab_size=96), "llama", 2)
    last = folder / "mp2" / "pytorch_model_1.bin"
    piece = torch.load(last)
    with pytest.raises(UserError, match=rf"--model {folder / 'mp2'}: pieces of the model whose config.json is beside them; give {folder}"):
        ModelFolder.open(folder / "mp2")
    torch.save({name: tensor + 1 if name.endswith("norm.weight") else tensor for name, tensor in piece.items()}, last)
    ModelFolder.open(folder)
    assert any("more are not alike in all pieces; those of the first are taken" in line for line in noted.messages)
    (folder / "mp3").mkdir()
    ModelFolder.open(folder)
    assert f"--model {folder} holds mp2 and mp3; mp2 is read" in noted.messages
    torch.save({name: tensor for name, tensor in piece.items() if name != "model.norm.weight"}, last)
    with pytest.raises(UserError, match=r"model.norm.weight is in some pieces of mp2, and not in all; copy the folder again"):
        ModelFolder.open(folder)
    sprung = tmp_path / "sprung"
    torch.save(piece | {"trap": Trap(sprung)}, last)
    with pytest.raises(UserError, match=r"pytorch_model_1.bin: damaged, or a pickle of more than tensors, which is not executed"):
        ModelFolder.open(folder)
    assert not sprung.exists()
    last.unlink()
    with pytest.raises(UserError, match=r"mp2/pytorch_model_1.bin is not there, one of the 2 pieces of mp2"):
        ModelFolder.open(folder)


def test_a_family_that_nobody_cuts_so_is_refused(tmp_path):
    folder = tiny_folder(tmp_path / "hf", "gpt2", vocab_size=96)
    (folder / "mp1").mkdir()
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "mp1" / "pytorch_model_0.bin")
    with pytest.raises(UserError, match=r"mp1 of a gpt2 model; pieces of llama, mistral, opt are read, as MiniLLM makes them"):
        ModelFolder.open(folder)
