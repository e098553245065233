"""A divergence of the user's own: a function in a file, called as those of megakd_kernels.divergence are."""

from __future__ import annotations

import inspect
import runpy
from functools import cache
from pathlib import Path

from megakd_kernels.divergence import DivergenceFunction, Objective

from megakd.config import DistillationConfig
from megakd.errors import UserError, file_errors

LOGGED = {"total", "lm", "hidden"}  # beside a divergence, which is logged by its name


def objective_of(settings: DistillationConfig) -> Objective:
    """--kd-objective: a name as it is, of FILE.py:FUNCTION the function.

    Raises:
        UserError: no such file, or no such function in it.
    """
    return own_function(*settings.own_divergence) if settings.own_divergence else settings.kd_objective


@cache
def own_function(file: str, name: str) -> DivergenceFunction:
    """The function of a file, which is executed once in a process.

    Raises:
        UserError: it is not there, or none that can be used.
    """
    flag = f"--kd-objective {file}:{name}"
    with file_errors(Path(file), flag="--kd-objective"):
        Path(file).open().close()
    found = runpy.run_path(file).get(name)
    if not inspect.isfunction(found):
        raise UserError(f"{flag}: {file} has no function {name}; write one of (log_q, log_p, total): docs/adding_a_method.md")
    if found.__name__ in LOGGED:
        raise UserError(f"{flag}: loss/{found.__name__} is logged beside it; give the function another name")
    return found
