"""PEFT's folder of a soft prompt, adapter_config.json and adapter_model.safetensors: what PromptKD leaves of its teacher.

    prompt_embeddings [P, H]      as wide as the embeddings, stands before the embeddings of a text and takes positions 0 to P - 1

PromptKD's own code leaves the same in SAVE/.../teacher, as adapter_model.bin.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.peft_folder import WEIGHTS
from megakd.checkpointing.publish import published
from megakd.errors import UserError, file_errors, read_json
from megakd.models.hf_checkpoint import ADAPTER
from megakd.models.model_provider import family_of
from megakd.models.pytorch_file import tensors_of
from megakd.models.shapes import head_size

FOLDER = "soft_prompt"
TENSOR, PICKLED_WEIGHTS = "prompt_embeddings", "adapter_model.bin"
KIND = "PROMPT_TUNING"


def write_soft_prompt(folder: Path, vectors_PH: Tensor, model: ModelFolder) -> None:
    """Both files, in one step; `model` is in front of whom it was trained."""
    hf, (length, hidden) = model.config, vectors_PH.shape
    config = {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model.path.resolve()),
        "num_virtual_tokens": length,
        "token_dim": hidden,
        "num_transformer_submodules": 1,
        "num_attention_heads": hf.num_attention_heads,
        "num_layers": hf.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",  # PEFT would else look for a text to begin with
        "inference_mode": True,
    }
    with published(folder) as beside:
        (beside / ADAPTER).write_text(json.dumps(config, indent=2) + "\n")
        save_file({TENSOR: vectors_PH.detach().float().cpu().contiguous()}, beside / WEIGHTS, metadata={"format": "pt"})


@dataclass(frozen=True)
class SoftPromptFolder:
    """Opened: `vectors` [P, H] in float32."""

    path: Path
    vectors: Tensor

    @classmethod
    def read(cls, path: str | Path, *, flag: str = "--soft-prompt") -> SoftPromptFolder:
        """
        Raises:
            UserError: no soft prompt of PEFT's, or a damaged one.
        """
        path = Path(path)
        if not (path / ADAPTER).is_file():
            raise UserError(f"{flag} {path}: no {ADAPTER}; give the folder {FOLDER}/ that a run of promptkd leaves, or PEFT's of a prompt")
        config = read_json(path / ADAPTER)
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind != KIND:
            way_out = "LORA's folder is a --model" if kind == "LORA" else f"{KIND} is read"
            raise UserError(f"{flag} {path}: {ADAPTER} has peft_type {kind!r}, which is no soft prompt; {way_out}")
        return cls(path, read_vectors(path, flag).float())

    def check(self, model: ModelFolder, *, flag: str = "--soft-prompt") -> None:
        """It stands before the embeddings of this model.

        Raises:
            UserError: it is as wide as another's.
        """
        width, words = self.vectors.shape[1], head_size(family_of(model.config), model.config)
        if width != words:
            raise UserError(
                f"{flag} {self.path} has vectors of {width} numbers, and {model.flag} {model.path} embeddings of {words}; "
                "give the model that it was trained in front of, PromptKD's teacher"
            )


def read_vectors(path: Path, flag: str) -> Tensor:
    """As they lie there."""
    if (path / WEIGHTS).is_file():
        with file_errors(path / WEIGHTS, flag=flag):
            tensors = load_file(path / WEIGHTS)
    elif (path / PICKLED_WEIGHTS).is_file():
        tensors = tensors_of(path / PICKLED_WEIGHTS)
    else:
        raise UserError(f"{flag} {path}: no {WEIGHTS}; copy the folder again")
    found = tensors.get(TENSOR)
    if found is None or found.ndim != 2 or not found.isfinite().all():
        raise UserError(f"{flag} {path}: holds no finite {TENSOR} [prompt positions, hidden size], but {', '.join(sorted(tensors)[:3])}")
    return found
