"""The Hugging Face side of a checkpoint, in its folder `huggingface/`: everything of the model's folder but its weights.

Rows of a Hugging Face tensor that no Megatron parameter holds (OPT's two unused positions) are kept in skipped_rows.safetensors:
the way back is exact to the bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from megakd.models.hf_checkpoint import HFCheckpoint
from megakd.models.hf_config import CONFIG, settle_config
from megakd.models.model_provider import family_of

FOLDER = "huggingface"
SKIPPED_ROWS = "skipped_rows.safetensors"
PATTERNS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)


def copy_hf_files(source: Path, target: Path) -> None:
    """config, generation config, tokenizer and chat templates, byte for byte."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted({path for pattern in PATTERNS for path in source.glob(pattern)}):
        copy = shutil.copytree if path.is_dir() else shutil.copyfile
        copy(path, target / path.name)


def write_hf_folder(source: Path, checkpoint_folder: Path, config: PretrainedConfig, weights: HFCheckpoint | None = None) -> None:
    """Make `huggingface/` from a Hugging Face folder, or from another checkpoint's `huggingface/`, whose opened config is `config`;
    `weights` are the folder's, where it is already known which those are."""
    target = checkpoint_folder / FOLDER
    copy_hf_files(source, target)
    settle_config(target / CONFIG, config)
    if (source / SKIPPED_ROWS).is_file():
        shutil.copyfile(source / SKIPPED_ROWS, target / SKIPPED_ROWS)
        return
    if skipped := family_of(config).skipped_rows:
        checkpoint = weights or HFCheckpoint(source)
        rows = {name: checkpoint.read(name, (slice(0, count), slice(None))).clone() for name, count in skipped.items()}
        save_file(rows, target / SKIPPED_ROWS)


def read_skipped_rows(hf_folder: Path) -> dict[str, Tensor]:
    """The kept rows by tensor name; empty for families that skip none."""
    file = hf_folder / SKIPPED_ROWS
    if not file.is_file():
        return {}
    return load_file(file)
