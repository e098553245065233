"""A run that is looked at before it begins."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.config.fields import POSITIVE, flag


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """What --dry-run is asked; docs/running.md shows its answer."""

    dry_run: bool = flag(
        False, "check all that can be checked without weights, say what the run would take, show two rows as the models read them, and end"
    )
    ranks: int | None = flag(
        None, "of --dry-run: how many ranks the run will have; default: WORLD_SIZE, or as few as the layouts need", range=POSITIVE
    )
