"""config.json of a Hugging Face folder, as transformers reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megakd.errors import UserError, read_json, refuse_lfs_pointer, said

CONFIG = "config.json"
SIZES = (  # of all families
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "ffn_dim", "n_inner", "max_position_embeddings", "sliding_window",
)  # fmt: skip
ROPE = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast", "beta_slow",
    "attention_factor",
)  # fmt: skip
ROPE_KINDS = ("rope_type", "type")
LAYERS, MOST_LAYERS = ("num_hidden_layers", "n_layer"), 100_000  # transformers makes a list of them
WAY_OUT = "give a folder that save_pretrained wrote"


def load_hf_config(folder: Path, *, flag: str) -> PretrainedConfig:
    """
    Raises:
        UserError: not JSON, a model type that transformers does not know, or a field that makes no sense.
    """
    fields = read_hf_json(folder / CONFIG, flag=flag)
    if any(isinstance(fields.get(name), int) and fields[name] > MOST_LAYERS for name in LAYERS):
        raise UserError(f"{flag} {folder}: config.json says more than {MOST_LAYERS:,} layers; {WAY_OUT}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)  # else it may ask, on every rank
    except Exception as error:  # transformers computes with whatever the fields hold: any exception can come of it
        raise UserError(f"{flag} {folder}: config.json cannot be read ({said(error)}); {WAY_OUT}") from error
    _check_sizes(config, f"{flag} {folder}")
    return config


def read_hf_json(file: Path, *, flag: str) -> dict:
    """A JSON object of a model's folder.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    refuse_lfs_pointer(file, flag=flag)
    fields = read_json(file, flag=flag)
    if not isinstance(fields, dict):
        raise UserError(f"{flag} {file}: holds a JSON {type(fields).__name__} where an object is needed; {WAY_OUT}")
    return fields


def _check_sizes(config: PretrainedConfig, name: str) -> None:
    """What is computed with later on."""
    for size in SIZES:
        value = getattr(config, size, None)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{name}: config.json says {size} {value!r}, which is no positive number; {WAY_OUT}")
    ropes = getattr(config, "rope_parameters", None) or {}
    of_kinds = [pair for said in ropes.values() if isinstance(said, dict) for pair in said.items()]  # where layers of two kinds turn by two
    for field, value in [*ropes.items(), *of_kinds]:
        if field in ROPE and value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise UserError(f"{name}: config.json says {field} {value!r}, which is no positive number; {WAY_OUT}")
        if field in ROPE_KINDS and not isinstance(value, str):
            raise UserError(f"{name}: config.json says {field} {value!r}, which is no name; {WAY_OUT}")
    heads = getattr(config, "num_attention_heads", 1)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise UserError(f"{name}: config.json says {heads} attention heads for {groups} key/value heads; {WAY_OUT}")


def settle_config(file: Path, config: PretrainedConfig) -> None:
    """The file says what was decided when the model was opened: its head is tied or not, and its weights are numbers.

    Where it says so already it is left alone, to the byte.
    """
    fields = json.loads(file.read_text(encoding="utf-8"))
    settled = {name: value for name, value in fields.items() if name not in ("quantization_config", "compression_config")}
    if type(config).from_dict(settled).tie_word_embeddings != config.tie_word_embeddings:
        settled["tie_word_embeddings"] = config.tie_word_embeddings
    if settled != fields:
        file.write_text(json.dumps(settled, indent=2) + "\n", encoding="utf-8")
