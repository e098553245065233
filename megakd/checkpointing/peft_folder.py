"""PEFT's folder of a LoRA adapter, adapter_config.json and adapter_model.safetensors: written from a checkpoint of a run that trained
one, and read beside the base model that its config names.

PEFT's names are `base_model.model.<module>.lora_A.weight`, [r, in], and `lora_B`, [out, r].
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megakd.checkpointing.native import NativeCheckpoint
from megakd.errors import UserError, read_json
from megakd.model_files import file_in
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.hf_checkpoint import ADAPTER, DTYPES
from megakd.models.hub_cache import local_folder
from megakd.models.lora import hf_rows, leaf, linear_mappings, modules_of, target_modules
from megakd.models.param_mapping import Source
from megakd.models.safetensors_file import read_tensors

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
UNREAD = {  # what changes the formula, and the value that leaves it as it is
    "use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None,
    "lora_bias": False, "layer_replication": None, "target_parameters": None, "trainable_token_indices": None,
}  # fmt: skip


def adapter_config(model: HiddenStateGPTModel, base: Path) -> dict:
    """adapter_config.json of the adapters that `model` has, whose own weights are those of the folder `base`."""
    lora, hf = model.adapted, model.hf_config
    targets = target_modules(hf, lora.lora_target_modules)
    mappings = [m for m in linear_mappings(hf).values() if targets & set(modules_of(m))]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": lora.rank,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": sorted({leaf(module) for module in targets}),
        "fan_in_fan_out": mappings[0].sources()[0].transposed,
        "bias": "none",
        "inference_mode": True,
    }


def write_adapter(native: NativeCheckpoint, folder: Path) -> Path:
    """Both files, in `folder`; returns that of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER).write_text(json.dumps(native.description.adapter, indent=2) + "\n")
    save_file(stored_adapter(native).tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder / WEIGHTS


def stored_adapter(native: NativeCheckpoint) -> PeftAdapter:
    """That of a checkpoint."""
    return PeftAdapter(native.folder, native.description.adapter, dict(_stored_tensors(native)))


def _stored_tensors(native: NativeCheckpoint) -> Iterator[tuple[str, Tensor]]:
    """(PEFT's name, tensor) of a checkpoint's adapters. B's rows lie there in the order of the layer that holds them."""
    hf = native.hf_config
    for path, mapping in linear_mappings(hf).items():
        for module in modules_of(mapping):
            stack = f"decoder.layers.{path}.adapters.{leaf(module)}"
            if f"{stack}.A" not in native:
                continue
            rows = hf_rows(mapping, module, hf)
            rows = rows[rows >= 0] if mapping.axis == 0 else torch.arange(native.shape(f"{stack}.B")[1])
            for number in range(hf.num_hidden_layers):
                name = PREFIX + module.replace("*", str(number))
                A, B = (_layer(native, f"{stack}.{part}", number) for part in "AB")
                yield f"{name}.lora_A.weight", A
                yield f"{name}.lora_B.weight", torch.empty_like(B).index_copy_(0, rows, B)


def _layer(native: NativeCheckpoint, key: str, number: int) -> Tensor:
    _, *sizes = native.shape(key)
    return native.read(key, (slice(number, number + 1), *(slice(0, size) for size in sizes)))[0]


# ---- reading


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter's folder, opened."""

    folder: Path
    config: dict
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path, *, flag: str) -> PeftAdapter:
        """
        Raises:
            UserError: no LoRA, a kind that is not built, or files that do not belong together.
        """
        config = read_json(folder / ADAPTER)
        kind = config.get("peft_type") if isinstance(config, dict) else None
        if kind != "LORA":
            raise UserError(f"{flag} {folder}: {ADAPTER} has peft_type {kind!r}; LORA is read, merge others with PEFT: merge_and_unload()")
        for name, usual in UNREAD.items():
            if config.get(name, usual) not in (usual, None, False, [], {}):
                found = f"{flag} {folder}: {ADAPTER} has {name} {config[name]!r}"
                raise UserError(f"{found}, which is not built; merge it with PEFT: merge_and_unload()")
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{flag} {folder}: no {WEIGHTS}; save the adapter as safetensors, PEFT's default")
        file = file_in(folder, WEIGHTS, named_by=folder / ADAPTER, flag=flag)
        return cls(folder, check_numbers(config, f"{flag} {folder}"), read_tensors(file, flag=flag))

    @property
    def base(self) -> Path:
        """The base model's folder: as named, beside the adapter, or in the hub's cache.

        Raises:
            UserError: it is named as on the hub, and the cache lacks it.
        """
        named = Path(str(self.config.get("base_model_name_or_path") or ""))
        if os.path.isdir(named) or named.is_absolute():
            return named
        beside = self.folder.parent / named
        return beside if os.path.isdir(beside) else local_folder(named, flag=f"{self.folder}: base_model_name_or_path")

    @property
    def scale(self) -> float:
        """α / r; α / √r of rank-stabilised ones."""
        r = self.config["r"]
        return self.config["lora_alpha"] / (r**0.5 if self.config.get("use_rslora") else r)

    def of(self, tensor: str) -> tuple[Tensor, Tensor] | None:
        """(A, B) for a Hugging Face weight, where it has one."""
        name = PREFIX + tensor.removesuffix(".weight")
        pair = tuple(self.tensors[file] for side in "AB" if (file := f"{name}.lora_{side}.weight") in self.tensors)
        return pair if tensor.endswith(".weight") and len(pair) == 2 else None


def product_shape(A: Tensor, B: Tensor) -> list[int] | None:
    """Of B·A, the shorter side first; None where there is no such product."""
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or not (A.is_floating_point() and B.is_floating_point()):
        return None
    return sorted((B.shape[0], A.shape[1]))


def check_numbers(config: dict, name: str) -> dict:
    """The same, its r and lora_alpha being numbers.

    Raises:
        UserError: one is not.
    """
    for field in ("r", "lora_alpha"):
        if type(value := config.get(field, 8)) not in (int, float) or not 0 < value < 1e6:
            raise UserError(f"{name}: {ADAPTER} has {field} {value!r}, which is no number above 0; copy or download it again")
    return {"r": 8, "lora_alpha": 8} | config  # PEFT's defaults


class MergedSource:
    """The base model's tensors with the adapter's products added, a slice at a time."""

    def __init__(self, base: Source, adapter: PeftAdapter, flag: str):
        self.base, self.adapter = base, adapter
        known = {name.partition(".lora_")[0] for name in adapter.tensors}
        for name in known:
            self._check(name.removeprefix(PREFIX) + ".weight", flag)

    def _check(self, tensor: str, flag: str) -> None:
        pair = self.adapter.of(tensor)
        fits = pair is not None and tensor in self.base and product_shape(*pair) == sorted(self.base.shape(tensor))
        if not fits:
            found = f"{flag} {self.adapter.folder}: {WEIGHTS} has an adapter of {tensor!r}"
            raise UserError(f"{found}, which does not fit the base model {self.adapter.base}; give the base that it was trained on")

    @property
    def files(self) -> set[Path]:
        """The base model's, and the adapter's."""
        return {*self.base.files, self.adapter.folder / ADAPTER, self.adapter.folder / WEIGHTS}

    def __contains__(self, name: str) -> bool:
        return name in self.base

    def shape(self, name: str) -> tuple[int, ...]:
        """That of the base model."""
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """That of the base model, of which a checkpoint says torch's and a Hugging Face folder safetensors' name."""
        dtype = self.base.dtype(name)
        return DTYPES.get(dtype, dtype)

    def place(self, name: str) -> str:
        """The base model's file."""
        return self.base.place(name)

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """In the base model's dtype; the sum is taken in float32."""
        stored, pair = self.base.read(name, index), self.adapter.of(name)
        if pair is None:
            return stored
        A, B = (part.float() for part in pair)
        transposed = bool(self.adapter.config.get("fan_in_fan_out"))
        rows, columns = index[::-1] if transposed else index
        delta = self.adapter.scale * (B[rows] @ A[:, columns])
        return (stored.float() + (delta.t() if transposed else delta)).to(stored.dtype)
