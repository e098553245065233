"""A model as the user names it: a Hugging Face folder or a native checkpoint. Both read the same, slice by slice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig

from megakd.checkpointing.hf_view import HuggingFaceView
from megakd.checkpointing.native import NativeCheckpoint, is_native
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.hf_checkpoint import HFCheckpoint
from megakd.models.model_provider import load_weights
from megakd.models.param_mapping import Source


@dataclass(frozen=True)
class ModelFolder:
    """`tokenizer_folder` also holds config.json; `tensors` are the weights under Hugging Face names."""

    path: Path
    flag: str
    config: PretrainedConfig
    tokenizer_folder: Path
    tensors: Source

    @classmethod
    def open(cls, path: str | Path, *, flag: str = "--model") -> ModelFolder:
        """Read headers and config, no weight.

        Raises:
            ValueError: neither a Hugging Face folder nor a native checkpoint, or a damaged one.
        """
        path = Path(path)
        if is_native(path):
            native = NativeCheckpoint(path, flag=flag)
            return cls(path, flag, native.hf_config, native.hf_folder, HuggingFaceView(native))
        checkpoint = HFCheckpoint(path, flag=flag)
        return cls(path, flag, checkpoint.config, path, checkpoint)


def load_model_weights(model: HiddenStateGPTModel, folder: ModelFolder) -> None:
    """Fill this rank's parameters, reading only this rank's slices; no rank waits for another.

    Raises:
        ValueError: a tensor is missing, or its shape is not what the model has.
    """
    load_weights(model, folder.tensors)
