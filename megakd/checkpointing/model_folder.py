"""The folder that --model or --teacher-model names: Hugging Face's or a native checkpoint, the same to everyone who asks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megakd.checkpointing.hf_view import HuggingFaceView
from megakd.checkpointing.native import NativeCheckpoint, is_native
from megakd.checkpointing.peft_folder import MergedSource, PeftAdapter
from megakd.data.end_ids import EndIds, end_ids
from megakd.data.tokenizer import load_tokenizer
from megakd.errors import UserError
from megakd.model_files import small_files
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.hf_checkpoint import ADAPTER, WEIGHTS, HFCheckpoint
from megakd.models.hub_cache import local_folder
from megakd.models.inspection import inspect
from megakd.models.model_provider import load_weights
from megakd.models.param_mapping import Source


@dataclass(frozen=True)
class ModelFolder:
    """Opened: headers and configs were read and checked against each other, no weight was loaded."""

    path: Path
    flag: str  # which flag named it, for error messages
    config: PretrainedConfig
    hf_folder: Path  # with config.json and the tokenizer
    source: Source
    soft_prompt: Tensor | None = None  # [P, H], stands before every text

    @property
    def soft_prompt_len(self) -> int:
        """Positions that the soft prompt takes."""
        return 0 if self.soft_prompt is None else len(self.soft_prompt)

    @classmethod
    def open(cls, path: str | Path, *, flag: str = "--model") -> ModelFolder:
        """
        Raises:
            UserError: neither a Hugging Face folder nor a native checkpoint, a damaged one, or a model that is not supported.
        """
        path = local_folder(path, flag=flag)
        small_files(path, flag=flag)
        if (path / ADAPTER).is_file() and not any((path / weights).is_file() for weights in WEIGHTS):
            return cls.of_adapter(PeftAdapter.read(path, flag=flag), flag)
        if is_native(path):
            native = NativeCheckpoint(path, flag=flag)
            small_files(native.hf_folder, flag=flag)
            if native.description.adapter:
                raise UserError(f"{flag} {path}: holds adapters, not a model; give the run's export, {path.parent / 'hf'}")
            return cls(path, flag, native.hf_config, native.hf_folder, HuggingFaceView(native))
        checkpoint = HFCheckpoint(path, flag=flag)
        inspect(checkpoint)
        return cls(path, flag, checkpoint.config, path, checkpoint)

    @classmethod
    def of_adapter(cls, adapter: PeftAdapter, flag: str) -> ModelFolder:
        """The base model's, with the adapter in its weights.

        Raises:
            UserError: the base model is not there, or another.
        """
        if not os.path.isdir(adapter.base):  # False for what is no path at all
            said = f"{flag} {adapter.folder}: {ADAPTER} says base_model_name_or_path {adapter.config.get('base_model_name_or_path')!r}"
            raise UserError(f"{said}, which is no folder here; write the base model's folder there")
        base = cls.open(adapter.base, flag=flag)
        return cls(adapter.folder, flag, base.config, base.hf_folder, MergedSource(base.source, adapter, flag))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's own, read when it is first asked for."""
        return load_tokenizer(self.hf_folder)

    @property
    def files(self) -> list[Path]:
        """All that is read of the model."""
        return sorted({*small_files(self.hf_folder, flag=self.flag), *self.source.files})

    @cached_property
    def ends(self) -> EndIds:
        """Where this model's answers end."""
        return end_ids(self.hf_folder, self.tokenizer)

    def load_into(self, model: HiddenStateGPTModel) -> None:
        """Fill this rank's parameters, reading only this rank's slices; no rank waits for another.

        Raises:
            UserError: a weight is NaN or infinite; this rank's share of a native checkpoint is not what was written.
        """
        if isinstance(self.source, HuggingFaceView):
            self.source.native.verify(rank=model.layout.place, ranks=model.layout.grid.size)
        load_weights(model, self.source)
