"""Which teacher a run has, by its flags."""

from __future__ import annotations

from collections.abc import Sequence

from megakd.config import Config
from megakd.data.batch import Sample
from megakd.loading import ModelFolders
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.teachers.live import LiveTeacher
from megakd.teachers.moving_average import MovingAverage
from megakd.teachers.quantised import quantised
from megakd.teachers.several import SeveralTeachers
from megakd.teachers.stored import StoredTeacher
from megakd.teachers.teacher import Teacher


def build_teacher(
    config: Config, folders: ModelFolders, student: HiddenStateGPTModel, models: Sequence[HiddenStateGPTModel], first: Sequence[Sample]
) -> Teacher | None:
    """`models` are the teacher's, none where the method has no teacher or a store; `first` is this replica's part of the first batch."""
    if folders.store:
        return StoredTeacher(folders.store, student)
    teachers = [live(model, config, first) for model in models]
    return SeveralTeachers(dict(zip(folders.named, teachers))) if folders.named else next(iter(teachers), None)


def live(model: HiddenStateGPTModel, config: Config, first: Sequence[Sample]) -> LiveTeacher:
    """The model: following the student, quantised, or as it is."""
    kind, decay = config.teacher.teacher_quantize, config.models.teacher_ema
    if decay is not None:
        return MovingAverage(model, decay)
    return LiveTeacher(model) if kind == "none" else quantised(model, kind, first, config.training.micro_batch_size)
