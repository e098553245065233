"""One inspection of a Hugging Face folder, whoever opens it: config.json is believed where the files agree with it.

Every tensor that the config asks for is there, with its shape and a dtype that is a number; every tensor that is there is used or
named. From headers alone, but for a head beside a tied embedding, which has to be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import torch
from transformers import PretrainedConfig

from megakd.errors import UserError, tell
from megakd.models.family import Family
from megakd.models.hf_checkpoint import ADAPTER, DTYPES, HFCheckpoint
from megakd.models.model_provider import family_of
from megakd.models.quantized import ACTIVATION_SCALES, code_dtypes, method_of, quantization
from megakd.models.rope import rope_parameters
from megakd.models.shapes import head_size, hf_shapes

HEAD = "lm_head.weight"
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # of older transformers, which computes them now
LORA = re.compile(r"\.(lora_|base_layer\.)")
NAMED = 3  # of the tensors that are left out
ROWS = 1024  # of the head and of the embedding that are compared at a time


def inspect(checkpoint: HFCheckpoint) -> set[str]:
    """Check the folder, and settle `checkpoint.config.tie_word_embeddings`; returns the stored names that are left out.

    Raises:
        UserError: a family that is not supported, or the files are not what config.json says.
    """
    hf, folder = checkpoint.config, f"{checkpoint.flag} {checkpoint.folder}"
    family = family_of(hf, flag=checkpoint.flag, name=str(checkpoint.folder))
    said = quantization(hf)
    settle_head(checkpoint, family)
    expected = partial(_at_layers, hf_shapes(family, hf), hf.num_hidden_layers)
    problem = next((found for name, shape in expected() if (found := _problem(checkpoint, name, shape))), None)
    if problem and said and not code_dtypes(said):
        raise UserError(f"{folder}: quantised by {method_of(said)}, which is not read here; give the model that it was made from")
    if problem:
        raise UserError(f"{folder}: {problem}")
    tied = {HEAD} if hf.tie_word_embeddings else set()
    left_out = checkpoint.tensors.keys() - {checkpoint.stored_name(name) for name, _ in expected()} - tied
    for line in _remarks(checkpoint, sorted(left_out - _harmless(checkpoint))):
        tell(f"{folder}: {line}")
    return left_out


def settle_head(checkpoint: HFCheckpoint, family: Family) -> None:
    """As transformers does: a tied config with another head in the file has its own head; with a head alone, it ties the other way."""
    hf = checkpoint.config
    words = family.table(hf, hf.vocab_size)["embedding.word_embeddings.weight"].tensor.name
    if not hf.tie_word_embeddings or HEAD not in checkpoint:
        return
    if words not in checkpoint:
        checkpoint.tensors[words] = checkpoint.tensors[HEAD]
    elif not _equal(checkpoint, words, HEAD):
        hf.tie_word_embeddings = False
        tell(
            f"{checkpoint.flag} {checkpoint.folder}: config.json ties the head to the embedding, but {HEAD} differs from {words}: "
            "both are used, as transformers does"
        )


def _equal(checkpoint: HFCheckpoint, one: str, other: str) -> bool:
    shape = checkpoint.shape(one)
    if shape != checkpoint.shape(other) or not {checkpoint.dtype(one), checkpoint.dtype(other)} <= set(DTYPES):
        return False
    rows = (slice(lo, min(lo + ROWS, shape[0])) for lo in range(0, shape[0], ROWS))
    index = lambda piece: (piece, *(slice(None) for _ in shape[1:]))
    pairs = ((checkpoint.read(one, index(piece)), checkpoint.read(other, index(piece))) for piece in rows)
    return all(torch.equal(a.double(), b.double()) for a, b in pairs)


def _at_layers(shapes: dict[str, tuple[int, ...]], num_layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in shapes.items():
        for layer in range(num_layers if "*" in name else 1):
            yield name.replace("*", str(layer)), shape


def _problem(checkpoint: HFCheckpoint, name: str, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor that the config asks for, and the way out."""
    if name not in checkpoint:
        if name == HEAD:
            return f"tensor {name!r} is missing; set tie_word_embeddings to true in config.json if the embedding is the head"
        if any(map(LORA.search, checkpoint.tensors)):
            return f"tensor {name!r} is missing beside LoRA tensors; merge them with peft's merge_and_unload() and save_pretrained"
        return f"tensor {name!r} is missing; the folder is incomplete or not what its config.json says"
    if checkpoint.shape(name) != shape:
        stored, hf = checkpoint.shape(name), checkpoint.config
        rows_alone = shape == (hf.vocab_size, head_size(family_of(hf), hf)) and stored[1:] == shape[1:]
        way_out = "set vocab_size to what the weights have" if rows_alone else "give the config.json that the weights were saved with"
        return f"{name} has shape {stored}, but config.json asks for {shape}; {way_out}"
    if checkpoint.dtype(name) not in DTYPES:
        return f"{name} is stored as {checkpoint.dtype(name)}, which is no number here; save the model with one of {', '.join(DTYPES)}"
    return None


def _harmless(checkpoint: HFCheckpoint) -> set[str]:
    """Stored names that no table names and that nobody misses."""
    scales = {scale.name for scale in checkpoint.scales.values()}
    endings = (*BUFFERS, *ACTIVATION_SCALES) if scales else BUFFERS
    return scales | {name for name in checkpoint.tensors if name.endswith(endings)}


def _remarks(checkpoint: HFCheckpoint, left: list[str]) -> Iterator[str]:
    """What a user may not know of a folder that is in order."""
    hf = checkpoint.config
    if left:
        more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
        yield f"no part of a {hf.model_type} model{_why(hf, left)}; left out: {', '.join(left[:NAMED])}{more}"
    if (checkpoint.folder / ADAPTER).is_file():
        yield f"{ADAPTER} lies beside whole weights; the adapter is not applied (peft's merge_and_unload() merges one)"
    if getattr(hf, "rope_parameters", None) and any(said.get("rope_type") == "dynamic" for said in rope_parameters(hf)):
        yield (
            f"rope_type 'dynamic' changes its frequencies in rows of more than {hf.max_position_embeddings} tokens "
            "(max_position_embeddings), which is as far as it is read here"
        )
    if not checkpoint.scales and (said := quantization(hf)):
        yield f"config.json says quantised by {method_of(said)}, but the weights are plain numbers; used as they are"


def _why(hf: PretrainedConfig, left: list[str]) -> str:
    if any(map(LORA.search, left)):
        return " (LoRA tensors, which are not merged)"
    layers = [int(number) for name in left for number in re.findall(r"\.(\d+)\.", name)]
    beyond = max(layers, default=-1)
    return f" of {hf.num_hidden_layers} layers (layers up to {beyond} are stored)" if beyond >= hf.num_hidden_layers else ""

