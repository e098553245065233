"""From the folders that flags name to models on this rank, for every command: open → check → align vocabularies → build → load."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.teacher_store import TeacherStore
from megakd.config import SELF, LayoutConfig
from megakd.data.end_ids import EndIds
from megakd.data.tokenizer import check_same_tokenizer
from megakd.errors import UserError, tell
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.model_provider import build_model, check_layout, context_length, padded_vocab_size
from megakd.runtime.initialize import check_world_size, initialize, resolve_dtype
from megakd.runtime.parallel_layout import ParallelLayout


@dataclass(frozen=True)
class ModelFolders:
    """The student, or whatever model answers, and its teacher where there is one: headers and configs were read, no weight. In place of
    a teacher a store of its targets. `named` are all teachers where there are several, `teacher` then the first of them."""

    student: ModelFolder
    teacher: ModelFolder | None = None
    store: TeacherStore | None = None
    named: Mapping[str, ModelFolder] = field(default_factory=dict)

    @classmethod
    def open(cls, model: str, teacher_model: str = "", teacher_cache: str = "", named_teachers: Mapping[str, str] = {}) -> ModelFolders:
        """A `teacher_model` called self is the model itself, once more. With a store the teacher's own folder is not opened, but has to be
        the one whose targets it holds.

        Raises:
            UserError: a folder holds no model that can be run, or no store.
        """
        teacher_model = model if teacher_model == SELF else teacher_model
        if teacher_cache:
            store = TeacherStore(teacher_cache)
            if teacher_model:
                store.check_teacher(teacher_model)
            return cls(ModelFolder.open(model, flag="--model"), store=store)
        named = {name: ModelFolder.open(path, flag="--teacher-model") for name, path in named_teachers.items()}
        if named:
            return cls(ModelFolder.open(model, flag="--model"), next(iter(named.values())), named=named)
        teacher = ModelFolder.open(teacher_model, flag="--teacher-model") if teacher_model else None
        return cls(ModelFolder.open(model, flag="--model"), teacher)

    @property
    def taught_by(self) -> ModelFolder | TeacherStore | None:
        """Whoever has the teacher's tokenizer, vocabulary and ends."""
        return self.teacher or self.store

    def __iter__(self) -> Iterator[ModelFolder]:
        return filter(None, (self.student, self.teacher, *self.others.values()))

    @property
    def others(self) -> dict[str, ModelFolder]:
        """Of several teachers all but the first."""
        return dict(list(self.named.items())[1:])

    def check(self, parallel: LayoutConfig) -> None:
        """Layout and tokenizers.

        Raises:
            UserError: the first thing that does not fit.
        """
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        check_world_size(tp, pp, int(os.environ.get("WORLD_SIZE", "1")))
        for folder in self:
            check_layout(folder.config, tp, pp, flag=folder.flag, name=str(folder.path))
        check_tokenizers(self.student, self.taught_by)
        for folder in self.others.values():
            check_tokenizers(self.student, folder)
            check_same_chat_template(self.teacher, folder)
        if self.store:
            self.store.check_vocabulary(self.student.config.vocab_size)

    def joined_ends(self) -> EndIds:
        """Those of the student, and of the teacher whose habit it learns; the student's are taught."""
        ends = self.student.ends
        for folder in filter(None, (self.taught_by, *self.others.values())):
            ends = ends.joined(folder.ends)
        return ends

    def load(
        self, layout: ParallelLayout, dtype: str, *, sequence_parallel: bool = False,
        student: Mapping[str, Any] = {}, teacher: Mapping[str, Any] = {},
    ) -> list[HiddenStateGPTModel]:
        """The student and, where there are any, the frozen teachers, over one vocabulary.

        student, teacher: TransformerConfig fields of one of them alone.
        """
        sizes = [folder.config.vocab_size for folder in (self.student, self.taught_by, *self.others.values()) if folder]
        options = align_vocabularies(sizes, layout.tp_size)
        options |= {"dtype": resolve_dtype(dtype), "sequence_parallel": sequence_parallel}
        models = [load_model(self.student, layout, **options, **student)]
        teachers = filter(None, (self.teacher, *self.others.values()))
        return models + [frozen(load_model(folder, layout, **options, **teacher)) for folder in teachers]


def load_model(folder: ModelFolder, layout: ParallelLayout, **options) -> HiddenStateGPTModel:
    """One model, its weights read; `options` are those of build_model."""
    model = build_model(folder.config, layout, **options)
    folder.load_into(model)
    return model


def frozen(model: HiddenStateGPTModel) -> HiddenStateGPTModel:
    """The same model, without dropout and without gradients."""
    return model.eval().requires_grad_(False)


def align_vocabularies(vocab_sizes: Sequence[int], tp_size: int) -> dict[str, int]:
    """Arguments of build_model with which models of one tokenizer and unequal widths hold the same token ids on every rank.

    Ids that not all of them have get no probability in any.
    """
    if len(set(vocab_sizes)) > 1:
        tell(f"vocabularies of {' and '.join(map(str, vocab_sizes))} rows are aligned by token id: the first {min(vocab_sizes)} count")
    return {"real_vocab_size": min(vocab_sizes), "padded_vocab_size": padded_vocab_size(list(vocab_sizes), tp_size)}


def start(parallel: LayoutConfig, *, seed: int = 1234) -> ParallelLayout:
    """Join the other ranks and take a place among them."""
    return initialize(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        seed=seed,
    )


# ---- checks


def check_context(folder: ModelFolder, length: int, extra: int, said: str, way_out: str) -> None:
    """`length` tokens beside `extra` ones are positions that the model has; a message calls them `said`, and `way_out` has {} for
    what `extra` leaves.

    Raises:
        UserError: they are more.
    """
    positions = context_length(folder.config)
    if length + extra > positions:
        way_out = way_out.format(positions - extra)
        raise UserError(f"{said} is more than the {positions} positions of {folder.flag} {folder.path}; {way_out}")


def check_same_chat_template(teacher: ModelFolder, other: ModelFolder) -> None:
    """A row is rendered for its teacher by the template of all.

    Raises:
        UserError: theirs differ.
    """
    if getattr(teacher.tokenizer, "chat_template", None) != getattr(other.tokenizer, "chat_template", None):
        raise UserError(
            f"--teacher-model {teacher.path} and {other.path} have different chat templates; copy one's chat_template.jinja, or the field "
            "chat_template of its tokenizer_config.json, to the other"
        )


def check_tokenizers(student: ModelFolder, teacher: ModelFolder | TeacherStore | None) -> None:
    """Both models spell text alike, and every id has a row in both embeddings.

    Raises:
        UserError: they do not, or an id has none.
    """
    if teacher is not None:
        check_same_tokenizer(student.tokenizer, teacher.tokenizer)
    for folder in filter(None, (student, teacher)):
        rows = folder.config.vocab_size
        beyond = sorted((index, token) for token, index in student.tokenizer.get_vocab().items() if index >= rows)
        if beyond:
            raise UserError(
                f"{folder.flag} {folder.path}: the tokenizer has ids up to {beyond[-1][0]}, but the model only {rows} embedding "
                f"rows, none for {beyond[0][1]!r}; use the tokenizer files that it was trained with (rows are padded with EOS: a "
                "[PAD] is not needed), or resize_token_embeddings(len(tokenizer)) and save_pretrained it"
            )
