"""Hugging Face folders on disk: config and weights, safetensors or PyTorch's own files, read tensor by tensor and slice by slice.

A file is mapped for one read and unmapped again, so that memory stays at the slice in hand whatever the model's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from megakd.errors import UserError, file_errors, tell
from megakd.model_files import file_in
from megakd.models.hf_config import CONFIG, load_hf_config, read_hf_json
from megakd.models.mp_files import JoinedTensor, joined_tensors, mp_sizes
from megakd.models.pytorch_file import tensors_of
from megakd.models.quantized import (
    MOVED,
    SCALE_DTYPES,
    SCALES,
    Scale,
    block_shape,
    check_block,
    code_dtypes,
    dequantize,
    quantization,
)
from megakd.models.safetensors_file import open_safetensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PYTORCH_INDEX, PYTORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
WEIGHTS = (SINGLE, INDEX, PYTORCH_SINGLE, PYTORCH_INDEX)  # in the order in which transformers looks for them
ADAPTER = "adapter_config.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, its name there, its shape and safetensors' name of its dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: JoinedTensor | None = None  # where it lies in several files

    @classmethod
    def of_pieces(cls, tensor: JoinedTensor) -> StoredTensor:
        """What an mpN folder holds."""
        return cls(tensor.file, tensor.name, tensor.shape, NAMES.get(tensor.dtype, str(tensor.dtype)), tensor)


class HFCheckpoint:
    """The weights of a Hugging Face folder. Opening it reads and checks every file's header, and no weight.

    Raises:
        UserError: no such folder, no config.json, a missing, truncated or unsafe file.
    """

    def __init__(self, folder: str | Path, *, flag: str = "--model", mp_size: int = 0):
        """`mp_size` N: the weights are those of FOLDER/mpN; 0: they are found."""
        self.folder, self.flag = Path(folder), flag
        _check_folder(self.folder, f"{flag} {folder}")
        if size := mp_size or self._only_pieces():
            joined = joined_tensors(self.folder, size, self.config, flag=flag)
            self.tensors = {name: StoredTensor.of_pieces(tensor) for name, tensor in joined.items()}
        else:
            self.tensors = {name: stored for file in self._files() for name, stored in read_header(file).items()}

    @cached_property
    def config(self) -> PretrainedConfig:
        """The folder's config.json."""
        return load_hf_config(self.folder, flag=self.flag)

    @cached_property
    def scales(self) -> dict[str, Scale]:
        """By the stored names of the tensors that hold codes, those of a method whose codes can be turned into numbers."""
        said = quantization(self.config)
        check_block(said, f"{self.flag} {self.folder}")
        codes = [stored for stored in self.tensors.values() if stored.dtype in code_dtypes(said) and len(stored.shape) == 2]
        return {stored.name: scale for stored in codes if (scale := self._scale_of(stored, said))}

    def _scale_of(self, codes: StoredTensor, said: dict) -> Scale | None:
        scale = next((self.tensors[codes.name + end] for end in SCALES if codes.name + end in self.tensors), None)
        is_moved = any(codes.name + end in self.tensors for end in MOVED)
        if scale is None or scale.dtype not in SCALE_DTYPES or is_moved:
            return None
        block = block_shape(codes.shape, scale.shape, said)
        return block and Scale(scale.name, block)

    @property
    def files(self) -> set[Path]:
        """Those that hold the weights."""
        return {file for stored in self.tensors.values() for file in (stored.pieces.files if stored.pieces else [stored.file])}

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored: GPT-2's Conv1D weights are [in, out]."""
        return self._find(name).shape

    def dtype(self, name: str) -> str:
        """safetensors' name of the dtype, F32, BF16, ...; of quantised weights the one that they are dequantised to."""
        stored = self._find(name)
        return NAMES.get(self.config.dtype, "BF16") if stored.name in self.scales else stored.dtype

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """A view of the mapped file, which stays mapped as long as the tensor lives; of quantised weights a copy."""
        stored = self._find(name)
        part = _read(stored, index)
        if stored.name not in self.scales:
            return part
        scale = self.scales[stored.name]
        whole = _read(self.tensors[scale.name])
        first = tuple(axis.indices(size)[0] for axis, size in zip(index, stored.shape))
        return dequantize(part, whole, scale.block, first, DTYPES[self.dtype(name)])

    def place(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return f"{self.flag} {self._find(name).file}"

    def stored_name(self, name: str) -> str:
        """Folders saved from a base model leave out its prefix: `h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`."""
        return name if name in self.tensors else without_prefix(name)

    def __contains__(self, name: str) -> bool:
        return self.stored_name(name) in self.tensors

    def _find(self, name: str) -> StoredTensor:
        if name not in self:
            raise UserError(
                f"{self.flag} {self.folder}: tensor {name!r} is missing; the folder is incomplete or not what its config.json says"
            )
        return self.tensors[self.stored_name(name)]

    def _only_pieces(self) -> int:
        """The N of mpN where the folder has no other weights."""
        sizes = mp_sizes(self.folder)
        if not sizes or any((self.folder / name).is_file() for name in WEIGHTS):
            return 0
        if len(sizes) > 1:
            tell(f"{self.flag} {self.folder} holds {' and '.join(f'mp{size}' for size in sizes)}; mp{sizes[0]} is read")
        return sizes[0]

    def _files(self) -> list[Path]:
        """As transformers looks for them: one file is taken before an index, which an earlier save may have left, and safetensors first."""
        for single, index in ((SINGLE, INDEX), (PYTORCH_SINGLE, PYTORCH_INDEX)):
            if (self.folder / single).is_file():
                return [file_in(self.folder, single, named_by=self.folder, flag=self.flag)]
            if (self.folder / index).is_file():
                return _indexed(self.folder / index, flag=self.flag)
        raise UserError(f"{self.flag} {self.folder}: {_no_weights(self.folder)}")


def _read(stored: StoredTensor, index: tuple[slice, ...] | None = None) -> Tensor:
    if stored.pieces:
        return stored.pieces.read(index)
    if is_pytorch(stored.file):
        tensor = tensors_of(stored.file)[stored.name]
        return tensor if index is None else tensor[index]
    with safe_open(stored.file, framework="pt") as file:
        return file.get_tensor(stored.name) if index is None else file.get_slice(stored.name)[index]


def _indexed(index: Path, *, flag: str) -> list[Path]:
    """The files that an index names.

    Raises:
        UserError: it is damaged.
    """
    weight_map = read_hf_json(index, flag=flag).get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(isinstance(name, str) for name in files):
        raise UserError(f"{flag} {index}: has no weight_map from tensors to files; copy or download it again")
    return [file_in(index.parent, name, named_by=index, flag=flag) for name in sorted(set(files))]


def _check_folder(folder: Path, name: str) -> None:
    """It is there, and a model's."""
    if not folder.is_dir():
        raise UserError(f"{name}: no such folder; give a Hugging Face folder or a native checkpoint")
    if (folder / CONFIG).is_file():
        return
    if (folder / ADAPTER).is_file():
        raise UserError(f"{name}: {_an_adapter(folder)}")
    if mp_sizes(folder.parent) and (folder.parent / CONFIG).is_file():
        raise UserError(f"{name}: pieces of the model whose config.json is beside them; give {folder.parent}")
    of_a_run = [folder / part for part in ("hf", "checkpoints") if (folder / part).is_dir()]
    of_the_hub = [config.parent for config in sorted(folder.glob("snapshots/*/config.json"))]
    inside = " or ".join(str(path) for path in of_a_run + of_the_hub)
    raise UserError(f"{name}: no config.json; give {inside or 'the folder that save_pretrained wrote, or a native checkpoint'}")


def _an_adapter(folder: Path) -> str:
    base = read_hf_json(folder / ADAPTER, flag="").get("base_model_name_or_path") or "a base model"
    return (
        f"holds an adapter of {base}, not a model; merge the two with peft's merge_and_unload() and give the folder that "
        "save_pretrained writes"
    )


def _no_weights(folder: Path) -> str:
    """What is there instead, and the way out."""
    for shards, index in (("model-*-of-*.safetensors", INDEX), ("pytorch_model-*-of-*.bin", PYTORCH_INDEX)):
        if found := sorted(path.name for path in folder.glob(shards)):
            return f"holds {found[0]} and {len(found) - 1} more, but no {index} that says what is in them; download it"
    if (folder / ADAPTER).is_file():
        return _an_adapter(folder)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    there = f" (there: {others[0]})" if others else ""
    return f"no {SINGLE} and no {INDEX}{there}; the weights are missing"


def is_pytorch(file: Path) -> bool:
    """Whether it is PyTorch's own format, by its name: an index may call a file anything."""
    return file.suffix == ".bin"


def without_prefix(name: str) -> str:
    """`transformer.h.0.ln_1.weight` -> `h.0.ln_1.weight`; "" for a name without a dot."""
    return name.partition(".")[2]


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file.

    Raises:
        UserError: the file is missing, shorter than its header says, or not what its name says.
    """
    with file_errors(file):  # a name from an index may be no file's
        there = file.is_file()
    if not there:
        raise UserError(f"{file}: the index names this file, but it is not there; download it again")
    if is_pytorch(file):
        return {name: StoredTensor(file, name, tuple(x.shape), NAMES.get(x.dtype, str(x.dtype))) for name, x in tensors_of(file).items()}
    with open_safetensors(file) as found:
        slices = {name: found.get_slice(name) for name in found.keys()}  # noqa: SIM118 - no dict
        return {name: StoredTensor(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
