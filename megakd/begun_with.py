"""What a run reads, as checksums: it is continued with the same contents, wherever they lie by then.

    SAVE/begun_with.json    {"--model": {"config.json": "9f2c...", "model.safetensors": "04b1..."}, "--train-data": {"": "77ab..."}, ...}

Everything that decides a result: data, templates, models, a teacher's store, a divergence of the user's own. A file that a flag names may
have another name by then, a folder another place. How much of a file is read: checkpointing/fingerprint.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megakd.checkpointing.fingerprint import all_files, checksum
from megakd.config import SELF, Config, flag_name
from megakd.data.open_data import data_files
from megakd.errors import UserError, read_json
from megakd.loading import ModelFolders
from megakd.reporting.own_folder import write_text
from megakd.runtime.initialize import agreed, on_rank_zero
from megakd.runtime.peers import Peers
from megakd.runtime.waiting import patient_group

FILE = "begun_with.json"
DATA, TEMPLATES = ("train_data", "valid_data", "lm_data"), ("prompt_template", "teacher_priming")
A_PATH = "(a path)"  # in place of one
Sums = dict[str, dict[str, str]]  # by flag, and by the file's name; by "" where the flag names the file


@dataclass(frozen=True)
class Named:
    """What a flag names: the path as it was given, and the files that are read of it."""

    path: str
    files: list[Path]
    whole: bool = True  # all bytes count; of weights, pieces

    def checksums(self) -> dict[str, str]:
        """By name.

        Raises:
            UserError: a file cannot be read.
        """
        if self.files == [Path(self.path)]:
            return {"": checksum(self.files, whole=self.whole)}
        names = {file.name: [other for other in self.files if other.name == file.name] for file in self.files}
        return {name: checksum(files, whole=self.whole) for name, files in names.items()}


def named_by(config: Config, folders: ModelFolders) -> dict[str, Named]:
    """By flag, and of several teachers by their names."""
    flat, own = config.flat(), config.distillation.own_divergence
    found = {"--model": Named(config.models.model, folders.student.files, whole=False)}
    for name, folder in folders.teachers.items():
        if (path := config.models.teachers[name]) != SELF:
            found[f"--teacher-model {name}".strip()] = Named(path, folder.files, whole=False)
    if folders.store:
        found["--teacher-cache"] = Named(config.teacher.teacher_cache, all_files(folders.store.path), whole=False)
    found |= {flag_name(name): Named(flat[name], data_files(flat[name])) for name in DATA if flat[name]}
    found |= {flag_name(name): Named(flat[name], [Path(flat[name])]) for name in TEMPLATES if is_template(flat[name])}
    return found | ({"--kd-objective": Named(own[0], [Path(own[0])])} if own else {})


def is_template(value: str) -> bool:
    """Whether it is a file, and no name or text."""
    return value.endswith(".jinja")


def beside_places(config: Config) -> dict[str, Any]:
    """All settings; of a path whose contents are compared, that it is one."""
    flat, own = config.flat(), config.distillation.own_divergence
    paths = [name for name in ("model", "teacher_cache", *DATA) if flat[name]] + [name for name in TEMPLATES if is_template(flat[name])]
    teachers = {"": config.models.teacher_model} if config.models.teacher_model == SELF else {**config.models.teachers}
    flat["teacher_model"] = [(name, path if path == SELF else A_PATH) for name, path in teachers.items()]
    flat["kd_objective"] = (A_PATH, own[1]) if own else flat["kd_objective"]
    return flat | dict.fromkeys(paths, A_PATH)


# ---- then and now


def agreed_checksums(config: Config, folders: ModelFolders, peers: Peers, *, continues: bool) -> Sums:
    """Those of this run. The first rank of each host reads its files; every rank of the job calls it.

    Raises:
        UserError: a host's differ, or a run that is continued was begun with others; on every rank.
    """
    hosts = [host for host, _ in peers.places]
    reads = hosts.index(hosts[dist.get_rank()]) == dist.get_rank()
    everyone: list[Sums] = [{} for _ in hosts]
    dist.all_gather_object(everyone, agreed(lambda: checksums(named_by(config, folders)) if reads else {}), group=patient_group())
    for host, sums in zip(hosts, everyone):
        for flag, what in differences(everyone[0], sums or everyone[0]):
            raise UserError(f"{flag} on {host}: {what}, against {hosts[0]}, where rank 0 is; copy the same files to both")
    on_rank_zero(lambda: continues and check(config, folders, everyone[0]))
    return everyone[0]


def checksums(named: Mapping[str, Named]) -> Sums:
    """Of everything that flags name."""
    return {flag: what.checksums() for flag, what in named.items()}


def check(config: Config, folders: ModelFolders, sums: Sums) -> None:
    """Of a run that is continued; one of an earlier version has kept no checksums.

    Raises:
        UserError: something is not what the run was begun with.
    """
    save, named = config.output.save, named_by(config, folders)
    for flag, what in differences(read(Path(save)) or sums, sums):
        place = f"{flag} {named[flag].path}" if flag in named else flag  # which is not given any more
        raise UserError(
            f"{place}: {what} since the run in --save {save} was begun; put it back as it was, or "
            "give another --save to start anew"
        )


def differences(then: Sums, now: Sums) -> Iterator[tuple[str, str]]:
    """Flag, and what has become of a file."""
    for flag, files in then.items():
        found = now.get(flag, {})
        for name in sorted({*files, *found}):
            what = "is gone" if name not in found else "is new" if name not in files else "has changed"
            if files.get(name) != found.get(name):
                yield flag, f"{name} {what}".strip()


def read(folder: Path) -> Sums | None:
    """What is kept in a run's folder; None of a run of an earlier version.

    Raises:
        UserError: it is damaged.
    """
    file, way_out = folder / FILE, "remove it, and what the run reads is compared with nothing"
    if not file.is_file():
        return None
    sums = read_json(file, way_out=way_out)
    if not (isinstance(sums, dict) and all(isinstance(files, dict) for files in sums.values())):
        raise UserError(f"{file}: holds no checksums; {way_out}")
    return sums


def keep(folder: Path, sums: Sums) -> None:
    """Write them down."""
    write_text(folder / FILE, json.dumps(sums, indent=1) + "\n")
