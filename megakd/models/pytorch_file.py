"""pytorch_model.bin, as published before safetensors: PyTorch's zip format, whose index is a pickle.

It is read by torch's `weights_only` unpickler, which makes tensors and calls nothing, and mapped: a tensor is a view of the file, and a
slice costs its own bytes.
"""

from __future__ import annotations

import pickle
import zipfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megakd.errors import UserError, file_errors, refuse_lfs_pointer, said

WAY_OUT = "load it with transformers where you trust it, and give the folder that save_pretrained writes"
MOST_PICKLE = 64 * 2**20  # bytes


def tensors_of(file: Path) -> dict[str, Tensor]:
    """By name; all tied names of a tensor are there.

    Raises:
        UserError: an older format, damaged, or holding anything but tensors; nothing in it was executed.
    """
    with file_errors(file):
        state = file.stat()
    return _mapped(file, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _mapped(file: Path, _changed: int, _size: int) -> dict[str, Tensor]:
    refuse_lfs_pointer(file)
    with file_errors(file):
        if not zipfile.is_zipfile(file):
            raise UserError(f"{file}: PyTorch's format of before version 1.6, or damaged; {WAY_OUT}")
    check_records(file)
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"{file}: damaged, or a pickle of more than tensors, which is not executed ({reason}); {WAY_OUT}") from error
    if not (isinstance(found, dict) and all(isinstance(name, str) and isinstance(x, Tensor) for name, x in found.items())):
        raise UserError(f"{file}: holds no dictionary of tensors by name; {WAY_OUT}")
    return found


def check_records(file: Path) -> None:
    """Its parts lie in it as they are, and its index is no larger than one can be.

    Raises:
        UserError: a part is packed, of which a small one could become anything, or the index is too large.
    """
    try:
        with file_errors(file), zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise UserError(f"{file}: damaged ({said(error)}); {WAY_OUT}") from error
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or (part.filename.endswith(".pkl") and part.file_size > MOST_PICKLE):
            raise UserError(
                f"{file}: its part {part.filename[:80]} is packed, or an index of more than {MOST_PICKLE:,} bytes, and torch.save "
                f"writes none; {WAY_OUT}"
            )
