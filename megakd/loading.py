"""From the folders that flags name to models on this rank, for every command: open → check → align vocabularies → build → load."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.teacher_store import TeacherStore
from megakd.config import SELF, ConditioningConfig, LayoutConfig, TeacherLayoutConfig
from megakd.data.conditioning import Conditioning
from megakd.data.end_ids import EndIds
from megakd.data.tokenizer import check_same_tokenizer
from megakd.errors import UserError, tell
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.model_provider import build_model, check_layout, context_length, padded_vocab_size
from megakd.runtime.initialize import agreed, check_world_size, initialize, initialize_apart, layout_over, resolve_dtype
from megakd.runtime.parallel_layout import Grid, ParallelLayout

AS_THE_STUDENT = TeacherLayoutConfig()  # a teacher without a layout of its own


@dataclass(frozen=True)
class Places:
    """Where student and teacher live, and this rank's place in each layout; None where it has none."""

    grids: tuple[Grid, Grid]
    student: ParallelLayout | None
    teacher: ParallelLayout | None

    @classmethod
    def in_one(cls, layout: ParallelLayout) -> Places:
        """Both in the same layout."""
        return cls((layout.grid, layout.grid), layout, layout)


@dataclass(frozen=True)
class ModelFolders:
    """The student, or whatever model answers, and its teachers by name, of which one alone has the empty name: headers and configs were
    read, no weight. In place of a teacher a store of its targets."""

    student: ModelFolder
    teachers: Mapping[str, ModelFolder] = field(default_factory=dict)
    store: TeacherStore | None = None

    @classmethod
    def open(cls, model: str, teachers: Mapping[str, str] = {}, teacher_cache: str = "") -> ModelFolders:
        """A teacher whose folder is self is the model itself, once more. With a store the teacher's own folder is not opened, but has to
        be the one whose targets it holds.

        Raises:
            UserError: a folder holds no model that can be run, or no store.
        """
        paths = {name: model if path == SELF else path for name, path in teachers.items()}
        if teacher_cache:
            store = TeacherStore(teacher_cache)
            for path in paths.values():
                store.check_teacher(path)
            return cls(ModelFolder.open(model, flag="--model"), store=store)
        opened = {name: ModelFolder.open(path, flag="--teacher-model") for name, path in paths.items()}
        return cls(ModelFolder.open(model, flag="--model"), opened)

    @property
    def taught_by(self) -> ModelFolder | TeacherStore | None:
        """Whoever has the teacher's tokenizer, vocabulary and ends; of several, which agree in them, the first."""
        return next(iter(self.teachers.values()), self.store)

    def __iter__(self) -> Iterator[ModelFolder]:
        return iter((self.student, *self.teachers.values()))

    def conditioning(self, settings: ConditioningConfig, *, template: str, taken: int, new_tokens: int) -> Conditioning | None:
        """What the teacher reads where the student reads a prompt, `taken` of its positions being something else's; None where that is the
        same, or nobody teaches.

        Raises:
            UserError: a template cannot be used.
        """
        if self.taught_by is None:
            return None
        tokenizers = self.student.tokenizer, self.taught_by.tokenizer
        positions = min(context_length(teacher.config) for teacher in self.teachers.values() or [self.store]) - taken
        return Conditioning.open(settings, *tokenizers, template=template, positions=positions, new_tokens=new_tokens)

    def check(self, parallel: LayoutConfig, teacher: TeacherLayoutConfig = AS_THE_STUDENT, *, ranks: int | None = None) -> None:
        """Layouts, on `ranks` ranks or those that were started, and tokenizers.

        Raises:
            UserError: the first thing that does not fit.
        """
        student, own = grids_of(parallel, teacher, ranks=ranks)
        for folder in self:
            grid = student if folder is self.student else own
            prefix = "--teacher-" if folder is not self.student and teacher.flags_given(parallel) else "--"
            check_layout(folder.config, grid.tp_size, grid.pp_size, flag=folder.flag, name=str(folder.path), prefix=prefix)
        for teacher in self.teachers.values() or [self.store]:
            check_tokenizers(self.student, teacher)
        for other in list(self.teachers.values())[1:]:
            check_same_chat_template(self.taught_by, other)
        if self.store:
            self.store.check_vocabulary(self.student.config.vocab_size)

    def joined_ends(self) -> EndIds:
        """Those of the student, and of the teacher whose habit it learns; the student's are taught."""
        ends = self.student.ends
        for teacher in self.teachers.values() or filter(None, [self.store]):
            ends = ends.joined(teacher.ends)
        return ends

    def load(
        self, layout: ParallelLayout, dtype: str, *, sequence_parallel: bool = False,
        student: Mapping[str, Any] = {}, teacher: Mapping[str, Any] = {},
    ) -> list[HiddenStateGPTModel]:
        """The student and, where there are any, the frozen teachers, over one vocabulary.

        student, teacher: TransformerConfig fields of one of them alone.
        """
        places = Places.in_one(layout)
        learner, teachers = self.load_apart(places, dtype, sequence_parallel=sequence_parallel, student=student, teacher=teacher)
        return [learner, *teachers]

    def load_apart(
        self, places: Places, dtype: str, *, sequence_parallel: bool = False,
        student: Mapping[str, Any] = {}, teacher: Mapping[str, Any] = {}, with_teachers: bool = True,
    ) -> tuple[HiddenStateGPTModel | None, list[HiddenStateGPTModel]]:
        """Of each what this rank has: its stage, or none. Every rank of the job calls it.

        Raises:
            UserError: a rank could not load its part; on all of them, before the next model, whose tied stages wait for each other.
        """
        sizes = [folder.config.vocab_size for folder in (*self, self.store) if folder]
        options = align_vocabularies(sizes, *(grid.tp_size for grid in places.grids))
        options |= {"dtype": resolve_dtype(dtype), "sequence_parallel": sequence_parallel}
        learner = agreed(lambda: places.student and load_model(self.student, places.student, **options, **student))
        load_teacher = lambda folder: places.teacher and frozen(load_model(folder, places.teacher, **options, **teacher))
        teachers = [agreed(partial(load_teacher, folder)) for folder in (self.teachers.values() if with_teachers else ())]
        return learner, teachers if places.teacher else []


def load_model(folder: ModelFolder, layout: ParallelLayout, **options) -> HiddenStateGPTModel:
    """One model, its weights read; `options` are those of build_model."""
    model = build_model(folder.config, layout, **options)
    folder.load_into(model)
    return model


def frozen(model: HiddenStateGPTModel) -> HiddenStateGPTModel:
    """The same model, without dropout and without gradients."""
    return model.eval().requires_grad_(False)


def align_vocabularies(vocab_sizes: Sequence[int], *tp_sizes: int) -> dict[str, int]:
    """Arguments of build_model with which models of one tokenizer and unequal widths hold the same token ids on every rank, and whole
    shards of one width where their layouts differ.

    Ids that not all of them have get no probability in any.
    """
    if len(set(vocab_sizes)) > 1:
        tell(f"vocabularies of {' and '.join(map(str, vocab_sizes))} rows are aligned by token id: the first {min(vocab_sizes)} count")
    return {"real_vocab_size": min(vocab_sizes), "padded_vocab_size": padded_vocab_size(list(vocab_sizes), math.lcm(*tp_sizes))}


def start(parallel: LayoutConfig, *, seed: int = 1234) -> ParallelLayout:
    """Join the other ranks and take a place among them."""
    return initialize(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        seed=seed,
    )


def start_apart(parallel: LayoutConfig, teacher: TeacherLayoutConfig, *, seed: int = 1234) -> Places:
    """The same for a student and a teacher that may have another layout, or ranks of its own."""
    grids = grids_of(parallel, teacher)
    if teacher.own_ranks:
        return Places(grids, *initialize_apart(*grids, seed=seed))
    layout = start(parallel, seed=seed)
    return Places(grids, layout, layout if grids[0] == grids[1] else layout_over(grids[1]))


def grids_of(parallel: LayoutConfig, teacher: TeacherLayoutConfig, *, ranks: int | None = None) -> tuple[Grid, Grid]:
    """The student's and the teacher's places on `ranks` ranks, by default those that were started.

    Raises:
        UserError: one of them does not fit.
    """
    ranks, own = ranks or int(os.environ.get("WORLD_SIZE", "1")), teacher.own_ranks
    if own >= ranks:
        raise UserError(
            f"--teacher-ranks {own} leaves the student none of the {ranks} rank(s) started; "
            f"use torchrun --nproc_per_node with {own + 1} or more"
        )
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    teacher_tp, teacher_pp = teacher.sizes(parallel)
    left, mine = {}, {}
    if own:
        left = {"which": f"rank(s) that --teacher-ranks {own} leaves of {ranks}", "way_out": f"start {own} and a multiple of {tp * pp}"}
        mine = {"which": f"of --teacher-ranks {own}", "way_out": f"use a multiple of {teacher_tp * teacher_pp}"}
    check_world_size(tp, pp, ranks - own, **left)
    check_world_size(teacher_tp, teacher_pp, own or ranks, prefix="--teacher-", **mine)
    first = ranks - own if own else 0
    return Grid(0, tp, pp, (ranks - own) // (tp * pp)), Grid(first, teacher_tp, teacher_pp, (own or ranks) // (teacher_tp * teacher_pp))


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
