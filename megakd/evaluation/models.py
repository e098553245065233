"""The models that answer and are compared: checked from their configs, then loaded in one layout."""

from __future__ import annotations

import os

from megakd.checkpointing.model_folder import ModelFolder
from megakd.config import AnsweringConfig
from megakd.errors import UserError
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.model_provider import build_model, check_layout, context_length, padded_vocab_size, share_vocabulary
from megakd.preflight import check_tokenizers
from megakd.runtime.initialize import check_world_size, initialize, resolve_dtype
from megakd.runtime.parallel_layout import ParallelLayout


def open_folders(config: AnsweringConfig, teacher_model: str = "") -> list[ModelFolder]:
    """The model and, where one is named, the teacher; configs and headers only.

    Raises:
        UserError: a folder, the layout, the tokenizers or the lengths do not fit.
    """
    folders = [ModelFolder.open(config.model, flag="--model")]
    folders += [ModelFolder.open(teacher_model, flag="--teacher-model")] if teacher_model else []
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    check_world_size(tp, pp, int(os.environ.get("WORLD_SIZE", "1")))
    for folder in folders:
        check_layout(folder.config, tp, pp, flag=folder.flag, name=str(folder.path))
        check_context(config, folder)
    check_tokenizers(*folders, *[None] * (2 - len(folders)))
    return folders


def check_context(config: AnsweringConfig, folder: ModelFolder) -> None:
    """The longest prompt with the longest response fits into the model's positions."""
    prompt, response = config.responses.max_prompt_length, config.responses.max_new_tokens
    bos = int(getattr(config, "add_bos", False))
    positions = context_length(folder.config)
    if prompt + bos + response > positions:
        extra = " + 1 of --add-bos" if bos else ""
        raise UserError(
            f"--max-prompt-length {prompt}{extra} + --max-new-tokens {response} is more than the {positions} positions of "
            f"{folder.flag} {folder.path}; lower their sum to {positions - bos}"
        )


def start(config: AnsweringConfig) -> ParallelLayout:
    """Join the other ranks."""
    parallel = config.parallel
    return initialize(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
    )


def load_models(folders: list[ModelFolder], layout: ParallelLayout, dtype: str) -> list[HiddenStateGPTModel]:
    """All folders in one layout, over one vocabulary."""
    width = padded_vocab_size([folder.config.vocab_size for folder in folders], layout.tp_size)
    models = [build_model(folder.config, layout, padded_vocab_size=width, dtype=resolve_dtype(dtype)) for folder in folders]
    for model, folder in zip(models, folders):
        folder.load_into(model)
        model.eval().requires_grad_(False)
    share_vocabulary(models)
    return models
