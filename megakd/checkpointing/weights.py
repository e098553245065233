"""Weights alone, into this rank's stage: from a Hugging Face folder or from a native checkpoint, whichever a folder is."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from megakd.checkpointing.hf_view import HuggingFaceView
from megakd.checkpointing.native import NativeCheckpoint, is_native
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.hf_checkpoint import HFCheckpoint
from megakd.models.model_provider import load_weights


def hf_folder_of(folder: str | Path, *, flag: str = "--model") -> Path:
    """The folder with config.json and the tokenizer: a Hugging Face folder itself, or the one inside a native checkpoint."""
    return NativeCheckpoint(folder, flag=flag).hf_folder if is_native(Path(folder)) else Path(folder)


def hf_config_of(folder: str | Path, *, flag: str = "--model") -> PretrainedConfig:
    """The config of a Hugging Face folder or of a native checkpoint."""
    return open_weights(folder, flag=flag)[1]


def open_weights(folder: str | Path, *, flag: str = "--model") -> tuple[HFCheckpoint | HuggingFaceView, PretrainedConfig]:
    """A `Source` of Hugging Face tensors and the model's config; reads headers only.

    Raises:
        ValueError: neither a Hugging Face folder nor a native checkpoint, or a damaged one.
    """
    if is_native(Path(folder)):
        native = NativeCheckpoint(folder, flag=flag)
        return HuggingFaceView(native), native.hf_config
    checkpoint = HFCheckpoint(folder, flag=flag)
    return checkpoint, checkpoint.config


def load_model_weights(model: HiddenStateGPTModel, folder: str | Path, *, flag: str = "--model") -> None:
    """Fill this rank's parameters, reading only this rank's slices; no rank waits for another.

    Raises:
        ValueError: as `open_weights`, or a tensor's shape is not what the model has.
    """
    load_weights(model, open_weights(folder, flag=flag)[0])
