"""SAVE/best: the student of the best evaluation so far, a Hugging Face folder like SAVE/hf.

Its megakd_export.json says which number it had, so that weights and number are published in one step, and a run that goes on knows what
is to be beaten. Of equal ones the first stays; the student as it began is none, for its folder is --model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from megakd.checkpointing.export_hf import REPORT, export_to_hf

FOLDER = "best"
NATIVE = ".best.native"  # what the folder is made of, for as long as that takes


class BestStudent:
    """What `folder` keeps by `metric`. Every rank decides alike, from the same numbers."""

    def __init__(self, folder: Path, metric: str, *, lower_is_better: bool) -> None:
        self.folder, self.metric = folder, metric
        self.sign = -1 if lower_is_better else 1
        kept = kept_best(folder)
        self.value: float | None = kept["value"] if kept.get("metric") == metric else None

    def beaten_by(self, metrics: Mapping[str, float]) -> bool:
        """Whether these numbers are better than the best so far, which they then are."""
        value = metrics[self.metric]
        if math.isnan(value) or (self.value is not None and self.sign * value <= self.sign * self.value):
            return False
        self.value = value
        return True

    def export(self, *, merge_adapter: bool) -> None:
        """The folder from what `save` of this iteration has written, which is then removed; on one rank."""
        said = {"best": {"metric": self.metric, "value": self.value}}
        export_to_hf(self.folder / NATIVE, self.folder / FOLDER, merge_adapter=merge_adapter, said=said)
        shutil.rmtree(self.folder / NATIVE)


def kept_best(folder: Path) -> dict[str, str | float]:
    """Metric and value of what a run's folder keeps; nothing where it keeps none."""
    file = folder / FOLDER / REPORT
    return json.loads(file.read_text()).get("best", {}) if file.is_file() else {}
