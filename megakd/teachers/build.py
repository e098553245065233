"""Which teacher a run has, by its flags."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megakd.config import Config
from megakd.data.batch import Sample
from megakd.loading import ModelFolders
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.runtime.parallel_layout import Grid
from megakd.teachers.live import LiveTeacher
from megakd.teachers.moving_average import MovingAverage
from megakd.teachers.offloaded import OffloadedTeacher
from megakd.teachers.quantised import quantised
from megakd.teachers.relayed import in_its_layout
from megakd.teachers.several import SeveralTeachers
from megakd.teachers.stored import StoredTeacher
from megakd.teachers.teacher import Teacher


def build_teacher(
    config: Config,
    folders: ModelFolders,
    grids: tuple[Grid, Grid],
    student: HiddenStateGPTModel,
    models: Sequence[HiddenStateGPTModel],
    first: Sequence[Sample],
) -> Teacher | None:
    """`models` are the teachers' that are on this rank; `grids` the layouts of student and teacher; `first` is this replica's part of the
    first batch."""
    if not config.needs_teacher:
        return None
    if folders.store:
        return StoredTeacher(folders.store, student)
    place = partial(in_its_layout, grids, student, live=partial(in_the_students_layout, config, first))
    if "" not in folders.teachers:
        return SeveralTeachers(dict(zip(folders.teachers, map(place, models))))
    return place(next(iter(models), None))


def in_the_students_layout(config: Config, first: Sequence[Sample], model: HiddenStateGPTModel) -> LiveTeacher:
    """The model as it is, or following the student, quantised, away between its passes."""
    kind, decay = config.teacher.teacher_quantize, config.models.teacher_ema
    if decay is not None:
        return MovingAverage(model, decay)
    if kind != "none":
        return quantised(model, kind, first, config.training.micro_batch_size)
    return OffloadedTeacher(model) if config.teacher_parallel.teacher_offload else LiveTeacher(model)
