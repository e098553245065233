"""The numbers of a run on Weights & Biases, where a project is named; wandb is imported then alone.

WANDB_MODE=offline writes SAVE/wandb for `wandb sync`. A run that is continued is the same one there: its id stands in SAVE/wandb-id.txt.
Curves are drawn over `iteration`, so that what is logged a second time falls on the same place.
"""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.errors import UserError, file_errors, said
from megakd.reporting.own_folder import write_text

ID = "wandb-id.txt"
WAY_OUT = "run `wandb login`, set WANDB_MODE=offline, or leave --wandb-project out"


def check_installed(project: str) -> None:
    """
    Raises:
        UserError: there is a project, and no wandb.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(f"--wandb-project {project}: wandb is not installed; pip install wandb, or leave it out")


class WandbRun:
    """One run of `project`. A `folder` whose run is `continued` has its id.

    Raises:
        UserError: wandb refuses, as without an account.
    """

    def __init__(self, folder: Path, project: str, name: str, settings: Mapping[str, Any], *, continued: bool) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=project,
                name=name or folder.name,
                dir=str(folder),
                id=run_id(folder, continued=continued),
                resume="allow",
                config=dict(settings),
            )
        except wandb.Error as error:
            raise UserError(f"--wandb-project {project}: {said(error)}; {WAY_OUT}") from error
        self.run.define_metric("*", step_metric="iteration")

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Under the names of metrics.jsonl."""
        self.run.log({"iteration": iteration, **metrics})

    def close(self) -> None:
        """What is on its way is sent only now."""
        self.run.finish()


def run_id(folder: Path, *, continued: bool) -> str:
    """The one of the run in this folder, or a new one."""
    file = folder / ID
    if continued and file.is_file():
        with file_errors(file):
            return file.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(4)
    write_text(file, f"{made}\n")
    return made
