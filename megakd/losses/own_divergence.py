"""A divergence of the user's own: a function in a file, called as those of megakd_kernels.divergence are."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path

from megakd_kernels.divergence import Objective

from megakd.errors import UserError, file_errors


@cache
def find_divergence(name: str) -> Objective:
    """The function of FILE.py:FUNCTION, whose file is executed once; another name as it is.

    Raises:
        UserError: no such file, or no such function in it.
    """
    file, colon, function = name.rpartition(":")
    if not (colon and file.endswith(".py")):
        return name
    with file_errors(Path(file), flag="--kd-objective"):
        Path(file).open().close()
    found = runpy.run_path(file).get(function)
    if not callable(found):
        way_out = "write one of (log_q, log_p, total): docs/adding_a_method.md"
        raise UserError(f"--kd-objective {name}: {file} has no function {function}; {way_out}")
    return found
