"""What a run writes down, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megakd.config.fields import NOT_NEGATIVE, POSITIVE, alias, flag


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves in --save."""

    save: Annotated[str, alias("--output-dir")] = flag(
        "", "folder of the run: config, metrics, checkpoints, Hugging Face export, figures", path=True
    )
    save_interval: Annotated[int | None, alias("--save-steps")] = flag(
        None, "iterations between checkpoints; default: only the last", range=POSITIVE
    )
    keep_last: int | None = flag(None, "of the checkpoints keep so many, the newest; default: all", range=POSITIVE)
    async_save: bool = flag(
        False, "write checkpoints beside training, from a copy of all state in the host's memory"
    )
    eval_interval: Annotated[int | None, alias("--eval-steps")] = flag(
        None,
        "iterations between evaluations; default: before and after, distillm: every epoch, ten a run at least",
        range=POSITIVE,
    )
    eval_iters: int | None = flag(None, "global batches of an evaluation; default: all of --valid-data", range=POSITIVE)
    log_interval: Annotated[int, alias("--logging-steps")] = flag(1, "iterations between progress lines", range=POSITIVE)
    wandb_project: str = flag("", "log to Weights & Biases, too, under this project; needs wandb, WANDB_MODE=offline needs no account")
    wandb_name: Annotated[str, alias("--wandb-exp-name")] = flag("", "of the run there; default: the last part of --save")
    save_rollouts: bool = flag(
        False,
        "write rollouts.jsonl: ids and loss mask of every response, so that any step can be recomputed",
        read_by="writes_responses",
    )
    show_data: int = flag(
        0,
        "print so many rows of --train-data as the student and the teacher read them, the part that the loss is on marked, and end",
        range=NOT_NEGATIVE,
    )
