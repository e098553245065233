"""The Hugging Face side of a checkpoint, in its folder `huggingface/`: everything of the model's folder but its weights.

Rows of a Hugging Face tensor that no Megatron parameter holds (OPT's two unused positions) are kept in skipped_rows.safetensors:
the way back is exact to the bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from megakd.model_files import small_files
from megakd.models.hf_checkpoint import HFCheckpoint
from megakd.models.hf_config import CONFIG, settle_config
from megakd.models.model_provider import family_of
from megakd.models.safetensors_file import read_tensors

FOLDER = "huggingface"
SKIPPED_ROWS = "skipped_rows.safetensors"


def copy_hf_files(source: Path, target: Path) -> None:
    """config, generation config, tokenizer and chat templates, byte for byte."""
    target.mkdir(parents=True, exist_ok=True)
    for file in small_files(source):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


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
    return read_tensors(file)
