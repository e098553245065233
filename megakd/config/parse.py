"""Flags over the YAML file of `--config`, over the defaults. What cannot be read is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from megakd.config.base import BaseConfig
from megakd.config.fields import alike, as_words
from megakd.config.train import Config
from megakd.config.yaml_file import read_yaml
from megakd.errors import UserError, fail, file_errors, quiet_pipe, tell

AnyConfig = TypeVar("AnyConfig", bound=BaseConfig)


def parse(arguments: Sequence[str], kind: type[AnyConfig] = Config, *, program: str = "pretrain_kd.py") -> AnyConfig:
    """Flags over the YAML file of `--config`, over the defaults of `kind`. Exits with one line where they cannot be read."""
    try:
        arguments, file = take_config_file(list(arguments))
        with quiet_pipe():
            config = from_flags(arguments, from_yaml(file, kind) if file else kind(), program=program)
        config.check()
        for remark in config.remarks():
            tell(remark)
        return config
    except UserError as error:
        fail(str(error))


def take_config_file(arguments: list[str]) -> tuple[list[str], str | None]:
    """`--config FILE` apart from the other flags."""
    rest, file = [], None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
        elif (file := value if equals else next(words, None)) is None:
            raise UserError("--config needs a YAML file")
    return rest, file


def from_yaml(file: str | Path, kind: type[AnyConfig] = Config) -> AnyConfig:
    """A configuration from a flat YAML file of flag names.

    Raises:
        UserError: no such file, not a mapping, or a key that is no flag.
    """
    file = Path(file).expanduser()
    with file_errors(file, flag="--config"):
        there = file.is_file()
    if not there:
        raise UserError(f"--config {file}: no such file; check the path")
    values = read_yaml(file)
    values = {str(name).lstrip("-").replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(values.keys() - kind().flat().keys()):
        raise UserError(f"--config {file}: unknown key {unknown[0]!r}; {suggestion(alike(unknown[0], kind().flat()))}")
    return from_values(values, kind, where=f"--config {file}: ")


def from_values(values: Mapping[str, Any], kind: type[AnyConfig] = Config, *, where: str = "") -> AnyConfig:
    """A configuration from values by flag name; None is as if it were not given.

    Raises:
        UserError: a value of the wrong type, in one line that begins with `where`.
    """
    words = [word for name, value in values.items() if value is not None for word in as_words(name, value)]
    return from_flags(words, kind(), where=where)


def description_of(kind: type[BaseConfig]) -> str:
    """What --help says first; `--config` is taken off before the flags are read, and has no line of its own there."""
    config = "--config FILE: a YAML file with any of these flags, `flag-name: value` a line; those given here lie over it."
    return f"{inspect.cleandoc(kind.__doc__)}\n\n{config}"


def from_flags(arguments: list[str], default: AnyConfig, *, where: str = "", program: str | None = None) -> AnyConfig:
    """Flags over `default`. `--help` prints and exits.

    Raises:
        UserError: an unknown flag or a value of the wrong type, in one line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            kind = type(default)
            return with_home(tyro.cli(kind, args=arguments, default=default, prog=program, description=description_of(kind)))
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UserError(where + one_line(said.getvalue())) from None


def one_line(box: str) -> str:
    """tyro's complaint without its frame, with the spellings of the flag that it finds most alike."""
    _title, body, *rest = re.split("─{3,}|-{9,}", re.sub("[│╭╮╰╯]", " ", box))  # where the terminal is ASCII, so is the frame
    meant = re.search(r"(?:similar to \S+|you meant):\s+(--[\w-]+(?:, --[\w-]+)*)", "".join(rest))
    return " ".join(body.split()).rstrip(".") + "; " + suggestion(meant and meant[1])


def suggestion(meant: str | None) -> str:
    """How a message about an unknown name ends."""
    return f"did you mean {meant}? --help lists the flags" if meant else "--help lists the flags"


def with_home(config: AnyConfig) -> AnyConfig:
    """`~` before a path, and before that of `name=path`, is the home folder: no shell has seen a YAML file, nor `--save=~/run`."""
    expand = lambda word: re.sub(r"^([^=/]*=)?(~[^/]*)", lambda found: (found[1] or "") + os.path.expanduser(found[2]), word)
    changes: dict[str, Any] = {}
    for line in dataclasses.fields(config):
        name, value = line.name, getattr(config, line.name)
        if dataclasses.is_dataclass(value):
            changes[name] = with_home(value)
        elif line.metadata.get("path"):
            changes[name] = expand(value) if isinstance(value, str) else tuple(map(expand, value))
    return dataclasses.replace(config, **changes)
