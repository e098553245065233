"""shim.cpp compiled and loaded, before torch: autograd then carries tensors of a CUDA device that is not there."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

from megakd.errors import UserError

SOURCE = Path(__file__).with_name("shim.cpp")
COMPILER = os.environ.get("CXX", "g++")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megakd"


def load() -> None:
    """Into this process, which has not imported torch.

    Raises:
        UserError: it is not compiled yet, and there is no compiler.
    """
    assert "torch" not in sys.modules, "the shim comes before torch"
    library = compiled()
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
    _loaded.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))


def hold_device() -> None:
    """The device is the shim's, also where torch, which is loaded by now, has brought one of its own."""
    for library in _loaded:
        library.megakd_hold_device()


_loaded: list[ctypes.CDLL] = []


def compiled() -> Path:
    """The library for this torch, made where it is not there yet: 3 s.

    Raises:
        UserError: there is no compiler, or it fails.
    """
    name = hashlib.sha256(SOURCE.read_bytes() + metadata.version("torch").encode() + str(torch_folder()).encode()).hexdigest()[:16]
    library = CACHE / f"simulation-{name}.so"
    if library.is_file():
        return library
    if shutil.which(COMPILER) is None:
        raise UserError(f"the simulation of a GPU needs a C++ compiler once, and there is no {COMPILER}; install g++, or name one in CXX")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder) / library.name
        said = subprocess.run(command(made), capture_output=True, text=True)
        if said.returncode:
            first = next(iter(said.stderr.strip().splitlines()), "it says nothing")
            raise UserError(f"{COMPILER} cannot compile {SOURCE} for this torch: {first[:200]}; name another compiler in CXX")
        made.rename(library)  # whole, if several processes make it at once
    return library


def command(out: Path) -> list[str]:
    """Of the compiler."""
    torch = torch_folder()
    headers = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
    libraries = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu"]
    return [COMPILER, "-O1", "-std=c++20", "-fPIC", "-shared", *headers, str(SOURCE), "-o", str(out), *libraries]


def torch_folder() -> Path:
    """Where torch lies; it is not imported."""
    return Path(util.find_spec("torch").origin).parent
