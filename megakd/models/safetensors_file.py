"""safetensors files, by whoever made them: eight bytes, the length of a header, the header, which is JSON, and the numbers."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megakd.errors import UserError, file_errors, refuse_lfs_pointer

MOST_HEADER = 32 * 2**20  # bytes; some 300,000 tensors, and the largest published files have a hundredth
WAY_OUT = "copy or download it again"


def open_safetensors(file: Path, *, flag: str = "", way_out: str = WAY_OUT) -> safe_open:
    """The file, mapped, its header read and checked: what it names lies within it.

    Raises:
        UserError: missing, a pointer that git left, shorter than its header says, a header that no model has, or none.
    """
    name = f"{flag} {file}".strip()
    refuse_lfs_pointer(file, flag=flag)
    with file_errors(file, flag=flag), file.open("rb") as stream:
        length, size = int.from_bytes(stream.read(8), "little"), file.stat().st_size
    if MOST_HEADER < length <= size:
        raise UserError(f"{name}: its header says that it has {length:,} bytes, and one has at most {MOST_HEADER:,}; {way_out}")
    try:
        with file_errors(file, flag=flag):
            return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{name}: {size:,} bytes, truncated or damaged ({error}); {way_out}") from error


def read_tensors(file: Path, *, flag: str = "") -> dict[str, Tensor]:
    """All tensors of a small file, by name.

    Raises:
        UserError: it cannot be read.
    """
    with open_safetensors(file, flag=flag) as found:
        return {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118 - no dict
