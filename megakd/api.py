"""From Python what the scripts do from the command line: `megakd.distill`, `megakd.evaluate`, `megakd.generate`.

A keyword is a flag's name. Models and rows may be objects: they become folders and files in the run's own folder, SAVE/inputs/, and from
there on everything is as if their paths had been given, so that the same call, or the script, continues the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megakd import preflight, trainer
from megakd.checkpointing.fingerprint import checksum, model_files
from megakd.checkpointing.native import read_latest
from megakd.checkpointing.publish import published
from megakd.config import AnyConfig, Config, EvaluateConfig, GenerateConfig, alike, from_values
from megakd.errors import UserError, file_errors, said, tell
from megakd.evaluation import evaluator
from megakd.generation import write_responses
from megakd.reporting.jsonl import read_jsonl
from megakd.reporting.own_folder import check_can_write
from megakd.runtime.initialize import among_ranks, on_rank_zero
from megakd.trainer import Callbacks

Rows = Iterable[Mapping[str, Any]]
Model = str | os.PathLike | PreTrainedModel
Data = str | os.PathLike | Rows

CALLED = {"model": "student", "teacher_model": "teacher"}  # what a keyword of distill is called, where it is not its flag
MODELS, DATA = ("model", "teacher_model"), ("train_data", "valid_data", "lm_data")


@dataclass(frozen=True)
class Distilled:
    """What a run has left."""

    folder: Path  # --save
    student: Path  # a Hugging Face folder
    log: list[dict[str, Any]]  # metrics.jsonl: one object an iteration, and one an evaluation

    @property
    def metrics(self) -> dict[str, float]:
        """Every number's last value."""
        return {name: value for row in self.log for name, value in row.items()}

    def load(self, **options) -> PreTrainedModel:
        """The student as a transformers model; `options` are those of from_pretrained."""
        return AutoModelForCausalLM.from_pretrained(self.student, **options)


def distill(
    *,
    student: Model,
    teacher: Model | Mapping[str, str | os.PathLike] | None = None,
    train_data: Data,
    valid_data: Data | None = None,
    save: str | os.PathLike,
    method: str = "promptkd",
    tokenizer: PreTrainedTokenizerBase | None = None,
    on_iteration: Callable[[int, dict[str, float]], None] | None = None,
    on_evaluation: Callable[[int, dict[str, float]], None] | None = None,
    **flags: Any,
) -> Distilled:
    """A whole run, or the rest of it: what scripts/pretrain_kd.py does. Every rank of torchrun calls it alike.

    Args:
        student, teacher: a folder, or a transformers model, which is only read; the method says whether there is a teacher,
            which may be "self", the student as it begins, or several folders by name, with `teacher_field`.
        train_data, valid_data: a path in any form of docs/data.md, or mappings of fields: a list of dicts, one split of a dataset.
        save: folder of the run, as of the script.
        tokenizer: of models that are given as objects; default: the one of the folder that the model was loaded from.
        on_iteration, on_evaluation: called on every rank with the iteration and its numbers, when they have been logged.
        flags: any other flag of the script by its name, `max_length=512`.

    Raises:
        UserError: something does not fit; before any weight is loaded where that can be known.
        TypeError: a keyword is no flag, or a model or data are of no kind that can be used.
    """
    check_keywords("distill", flags, Config().flat().keys() - {*CALLED, "show_data", "dry_run", "ranks"}, called=CALLED)
    if isinstance(teacher, Mapping):
        teacher = tuple(f"{name}={os.fspath(path)}" for name, path in teacher.items())
    given = {"model": student, "teacher_model": teacher, "train_data": train_data, "valid_data": valid_data}
    inputs = Inputs(Path(save), given | {name: flags.pop(name) for name in DATA if name in flags}, tokenizer)
    config = config_of("distill", Config, {**inputs.paths(), "method": method, "save": save, **flags})
    told = {"on_iteration": on_iteration, "on_evaluation": on_evaluation}
    callbacks = Callbacks(**{name: callback for name, callback in told.items() if callback})
    with among_ranks():
        check_on_rank_zero(config.output.save)
        trainer.train(config, callbacks=callbacks, write_inputs=lambda: inputs.write(config))
    return Distilled(Path(config.output.save), Path(config.output.save) / "hf", read_jsonl(Path(config.output.save) / "metrics.jsonl"))


def evaluate(*, model: str | os.PathLike, **flags: Any) -> dict[str, Any]:
    """Scores, as of scripts/evaluate.py, on every rank: `results["sets"]["test"]["rouge_l"]` with `data=["test.jsonl"]`.

    Raises:
        UserError: something does not fit.
        TypeError: a keyword is no flag.
    """
    config = config_of("evaluate", EvaluateConfig, {"model": model, **flags})
    with among_ranks():
        check_on_rank_zero(config.save)
        return evaluator.evaluate(config)


def generate(*, model: str | os.PathLike, data: str | os.PathLike, save: str | os.PathLike, **flags: Any) -> Path:
    """Answers to the prompts of a file into the file `save`, as of scripts/generate.py.

    Raises:
        UserError: something does not fit.
        TypeError: a keyword is no flag.
    """
    config = config_of("generate", GenerateConfig, {"model": model, "data": data, "save": save, **flags})
    with among_ranks():
        check_on_rank_zero(Path(config.save).parent)
        write_responses.write_responses(config)
    return Path(config.save)


def check_on_rank_zero(save: str | Path) -> None:
    """That the folder can be written, which rank 0 alone tries, is known to ranks that go on after an error as well.

    Raises:
        UserError: it cannot; on every rank.
    """
    if save:
        on_rank_zero(lambda: check_can_write(Path(save), flag="--save"))


def check_keywords(function: str, given: Iterable[str], names: Iterable[str], *, called: Mapping[str, str] = {}) -> None:
    """As Python does, and with the name that was probably meant; `called` says what a keyword is called in place of its flag's name."""
    for name in given:
        if name not in names:
            meant = called.get(name) or alike(name, [*names, *called.values()])
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}" + (f"; did you mean {meant}?" if meant else ""))


def config_of(function: str, kind: type[AnyConfig], values: Mapping[str, Any]) -> AnyConfig:
    """A checked configuration; what has no effect is told, as on the command line."""
    check_keywords(function, values, kind().flat())
    config = from_values(values, kind, where=f"{function}(): ")
    config.check()
    for remark in config.remarks():
        tell(remark)
    return config


# ---- models and rows that are objects


@dataclass(frozen=True)
class Inputs:
    """What `distill` was given by the names of flags, and where the objects among it are written: SAVE/inputs/."""

    save: Path
    given: Mapping[str, Any]
    tokenizer: PreTrainedTokenizerBase | None

    def paths(self) -> dict[str, Any]:
        """The flags' values: paths as they are, of objects those to be."""
        objects = self._objects()
        if self.tokenizer is not None and not objects.keys() & {*MODELS}:
            raise TypeError("tokenizer is of a model that is given as an object; a folder has its own")
        return {name: self._folder / file_of(name) if name in objects else value for name, value in self.given.items()}

    def write(self, config: Config) -> None:
        """On rank 0, for all; a run that is continued must be given what it was begun with.

        Raises:
            UserError: it was not, or a model has no tokenizer, or a row is no mapping of what JSON can say.
        """
        if self._objects():
            on_rank_zero(lambda: self._write(config))

    @property
    def _folder(self) -> Path:
        return self.save.expanduser() / "inputs"

    def _objects(self) -> dict[str, Any]:
        named = lambda name, value: name == "teacher_model" and isinstance(value, tuple)
        path = lambda value: value is None or isinstance(value, (str, os.PathLike))
        found = {name: value for name, value in self.given.items() if not (path(value) or named(name, value))}
        for name, value in found.items():
            expected, kind = (PreTrainedModel, "a transformers model") if name in MODELS else (Iterable, "rows")
            if not isinstance(value, expected):
                way_out = " (of an adapter: what merge_and_unload() returns)" if name in MODELS else ""
                raise TypeError(f"{CALLED.get(name, name)} is a {type(value).__name__}; give a path or {kind}{way_out}")
        return found

    def _write(self, config: Config) -> None:
        preflight.own_folder(config).claim()
        begun = read_latest(self.save.expanduser() / "checkpoints") is not None
        with published(self._folder) as folder:
            for name, value in self._objects().items():
                target = folder / file_of(name)
                if name in MODELS:
                    write_model(value, self.tokenizer, target, name=CALLED[name])
                else:
                    write_rows(value, target, name=name)
                if begun and fingerprint(target) != fingerprint(self._folder / file_of(name)):
                    raise UserError(
                        f"{CALLED.get(name, name)} is not what the run in --save {self.save} was begun with; give the same to continue it, "
                        "or another --save to start anew"
                    )


def file_of(name: str) -> str:
    """What an input is called in SAVE/inputs/."""
    return CALLED[name] if name in MODELS else f"{name}.jsonl"


def fingerprint(path: Path) -> str:
    """Of a file, or of a Hugging Face folder."""
    return checksum(model_files(path), whole=False) if path.is_dir() else checksum([path], whole=True)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path, *, name: str) -> None:
    """A Hugging Face folder."""
    tokenizer = tokenizer or own_tokenizer(model, name=name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def own_tokenizer(model: PreTrainedModel, *, name: str) -> PreTrainedTokenizerBase:
    """That of the folder which the model was loaded from.

    Raises:
        UserError: there is none.
    """
    if not model.name_or_path:
        raise UserError(f"{name} is a model that was loaded from no folder; give its tokenizer as tokenizer=")
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions, transformers whatever comes of odd fields
        raise UserError(
            f"{name} was loaded from {model.name_or_path}, whose tokenizer does not load ({said(error)}); give one as tokenizer="
        ) from error


def write_rows(rows: Rows, file: Path, *, name: str) -> None:
    """One JSON object a line."""
    with file_errors(file), file.open("wb") as stream:
        for number, row in enumerate(rows, start=1):
            stream.write(line_of(row, f"{name} row {number}"))


def line_of(row: object, where: str) -> bytes:
    """
    Raises:
        UserError: it is no mapping, or JSON cannot say what it holds.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where} is a {type(row).__name__}; give mappings of fields: a list of dicts, or one split of a dataset")
    try:
        return json.dumps(dict(row), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where} holds what JSON cannot say ({said(error)}); give text, numbers, lists and dicts of them") from error
