"""What a teacher says, on disk: written once, read by any layout, batch size and order.

    store.json                   which teacher, data and conditioning; what is stored of them, in how many files
    teacher/                     the teacher's config.json and tokenizer, without its weights
    head.safetensors             beside hidden states: the output layer [V, H]
    targets-00000.safetensors    n texts: `keys` [n, 16], `ends` [n], where the rows of each end, and of all their supervised positions
        hidden                   hidden [rows, H]
        dense                    logits [rows, V]: log-probabilities but for a number a row, which no loss sees
        topk                     ids, log_probs [rows, K]; log_rest, log_min [rows]

A text is found by its key, a digest of the token ids that the teacher read and of those of the response. The same text has the same
rows, whatever data set, line or batch it comes from; another text has none, and is refused by its place. Files appear whole or not at all,
and are safetensors: they are mapped, and a rank reads its own rows and columns of them.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from megakd.checkpointing.fingerprint import OF_A_MODEL, checksum, model_files
from megakd.checkpointing.json_fields import described
from megakd.checkpointing.model_folder import ModelFolder
from megakd.data.batch import Sample
from megakd.data.end_ids import EndIds, end_ids
from megakd.data.tokenizer import load_tokenizer
from megakd.errors import UserError, file_errors, read_json
from megakd.model_files import check_inside
from megakd.models.hf_config import load_hf_config
from megakd.models.safetensors_file import open_safetensors
from megakd.reporting.own_folder import hidden, write_text

FORMAT = 1
DESCRIPTION, TEACHER, HEAD = "store.json", "teacher", "head.safetensors"
WEIGHTS = (".safetensors", ".bin", ".index.json")
HALF = 8  # bytes of a key that are the prompt's; the response has as many
WRITE = "write it with scripts/cache_teacher.py"
REMOVE = "remove it, and give the command that wrote it again"
WRITE_ANEW = "write another with scripts/cache_teacher.py, or give --teacher-model in its place"


def key_of(sample: Sample) -> bytes:
    """16 bytes: of what the teacher reads in front, and of the response with the number of its tokens that count."""
    digest = lambda ids: hashlib.blake2b(array.array("q", ids).tobytes(), digest_size=HALF).digest()
    return digest(sample.for_teacher.prompt) + digest((sample.num_labels, *sample.response))


@dataclass(frozen=True)
class Description:
    """store.json."""

    kind: str  # hidden, dense or topk
    top_k: int | None
    dtype: str  # of the teacher as it read, and of hidden states and logits
    vocab_size: int  # ids that are told apart: the teacher's, of topk those that count in the student as well
    hidden_size: int
    teacher: str  # its folder
    checksum: str  # of that
    quantize: str  # as --teacher-quantize has it
    conditioning: dict[str, Any]  # flags that say what the teacher reads
    data: dict[str, str]  # files by flag
    texts: int
    rows: int
    files: int
    contents: str  # digest of all keys in their order
    format: int = FORMAT

    @property
    def row_bytes(self) -> int:
        """Of one position."""
        if self.kind == "topk":
            return 8 * self.top_k + 8  # int32 and float32
        return getattr(torch, self.dtype).itemsize * (self.hidden_size if self.kind == "hidden" else self.vocab_size)

    @classmethod
    def read(cls, folder: Path, *, flag: str) -> Description:
        """
        Raises:
            UserError: the folder is no store, or one of another version.
        """
        if not (folder / DESCRIPTION).is_file():
            raise UserError(f"{flag} {folder}: holds no {DESCRIPTION}, so it is no teacher's store; {WRITE}")
        fields = read_json(folder / DESCRIPTION, flag=flag)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or fields.get("format") != FORMAT or fields.keys() != names or fields["kind"] not in (*NAMES,):
            raise UserError(f"{flag} {folder / DESCRIPTION}: is of another version of megakd; {WRITE_ANEW}")
        try:
            return described(cls, fields)
        except TypeError as error:
            raise UserError(f"{flag} {folder / DESCRIPTION}: is damaged ({error}); {WRITE_ANEW}") from error

    def write(self, folder: Path) -> None:
        """In one step."""
        write_text(folder / DESCRIPTION, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def targets_file(folder: Path, number: int) -> Path:
    """The file of this number, from 0."""
    return folder / f"targets-{number:05d}.safetensors"


def write_targets(folder: Path, number: int, keys: Sequence[bytes], rows: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    """One file: the rows of each text, one text after the other."""
    index = {"keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8), "ends": torch.tensor(rows).cumsum(0)}
    write_tensors(targets_file(folder, number), index | dict(tensors))


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Beside, then renamed.

    Raises:
        UserError: the disk is full, or refuses.
    """
    with file_errors(file):
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, hidden(file))
        except SafetensorError as error:
            hidden(file).unlink(missing_ok=True)
            raise UserError(f"{file}: cannot be written ({error}); free some space, or give a path that can be written") from error
        os.replace(hidden(file), file)


def copy_teacher(source: ModelFolder, folder: Path) -> None:
    """config.json, tokenizer and ends of the teacher."""
    with file_errors(folder / TEACHER):
        (folder / TEACHER).mkdir(exist_ok=True)
        for file in sorted(source.hf_folder.iterdir()):
            if file.is_file() and file.suffix in OF_A_MODEL and not file.name.endswith(WEIGHTS):
                check_inside(file, source.hf_folder)
                shutil.copyfile(file, folder / TEACHER / file.name)


class TeacherStore:
    """A whole store, opened: headers and keys were read. To tokenizers and vocabularies it is what a teacher's folder is.

    Raises:
        UserError: it is none, or not whole.
    """

    flag = "--teacher-cache"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.description = Description.read(self.path, flag=self.flag)
        self._files = [self._open(targets_file(self.path, number)) for number in range(self.description.files)]
        self._head = self._open(self.path / HEAD) if self.description.kind == "hidden" else None
        for number in range(len(self._files)):
            self._check(number)
        self._places = {key: place for number in range(len(self._files)) for key, place in self._index(number)}

    def _open(self, file: Path):
        if not file.is_file():
            raise UserError(
                f"{self.flag} {self.path}: {file.name} of {self.description.files} files is not there yet; the command that writes it, "
                "given again, goes on with it"
            )
        check_inside(file, self.path, flag=self.flag)
        return open_safetensors(file, flag=self.flag, way_out=REMOVE)

    def _check(self, number: int) -> None:
        """A file has a key and a place in its rows for every text, and all that a row holds."""
        file = self._files[number]
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no dict
        texts, rows = shapes.get("keys", [0])[0], [shapes[name][:1] for name in NAMES[self.description.kind] if name in shapes]
        ends = file.get_tensor("ends").tolist() if "ends" in shapes else []
        whole = shapes.get("keys") == [texts, 2 * HALF] and shapes.get("ends") == [texts] and len(rows) == len(NAMES[self.description.kind])
        if not (whole and min(ends, default=0) >= 0 and sorted(ends) == ends and all(row == [max(ends, default=0)] for row in rows)):
            raise UserError(f"{self.flag} {targets_file(self.path, number)}: is damaged, its texts and rows do not fit; {REMOVE}")

    def _index(self, number: int) -> Iterator[tuple[bytes, tuple[int, int, int]]]:
        file, start = self._files[number], 0
        for key, end in zip(file.get_tensor("keys").numpy(), file.get_tensor("ends").tolist()):
            yield key.tobytes(), (number, start, end)
            start = end

    # ---- what a teacher's folder has too

    @cached_property
    def config(self) -> PretrainedConfig:
        """The teacher's."""
        return load_hf_config(self.path / TEACHER, flag=self.flag)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's."""
        return load_tokenizer(self.path / TEACHER)

    @cached_property
    def ends(self) -> EndIds:
        """Where the teacher's answers end."""
        return end_ids(self.path / TEACHER, self.tokenizer)

    # ---- checks

    def check_teacher(self, folder: str) -> None:
        """A folder that is named beside the store is the one whose targets it holds.

        Raises:
            UserError: it is another, or has changed.
        """
        if checksum(model_files(Path(folder)), whole=False) != self.description.checksum:
            raise UserError(
                f"--teacher-model {folder} is not, or no longer, the model whose targets {self.flag} {self.path} holds; leave "
                "--teacher-model out to learn from those, or write another with scripts/cache_teacher.py"
            )

    def check_conditioning(self, flags: Mapping[str, Any]) -> None:
        """
        Raises:
            UserError: the teacher was to read something else.
        """
        for name, value in flags.items():
            if value != (stored := self.description.conditioning.get(name)):
                flag = f"--{name.replace('_', '-')}"
                raise UserError(
                    f"{flag} {value or '(none)'} differs from the {stored or '(none)'} that {self.flag} {self.path} was written with; "
                    f"give that, or {WRITE_ANEW}"
                )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Log-probabilities of the likeliest tokens are of all ids that count: those that the student has, too.

        Raises:
            UserError: they are of others.
        """
        counted = self.description.vocab_size
        if self.description.kind == "topk" and counted != min(vocab_size, self.config.vocab_size):
            raise UserError(
                f"{self.flag} {self.path} counts {counted} token ids, and --model has {vocab_size}; write another with "
                "scripts/cache_teacher.py --model, which counts those that both have"
            )

    def check_texts(self, samples: Sequence[Sample], where) -> None:
        """Every text that will be asked for is here. `where(i)` is the place of a sample.

        Raises:
            UserError: the first that is not.
        """
        for number in range(len(samples)):
            key = key_of(samples[number])
            if key not in self._places:
                known = any(key[:HALF] == other[:HALF] for other in self._places)
                what = "its response is not the one" if known else "its prompt, as the teacher reads it, is none of those"
                raise UserError(
                    f"{where(number)}: {what} that {self.flag} {self.path} was written for; give the data, the lengths, the template and "
                    "the tokenizer that scripts/cache_teacher.py had, or write another store for these"
                )

    # ---- what is read

    def read(self, key: bytes, columns: Mapping[str, slice] = {}) -> dict[str, Tensor]:
        """The rows of one text by name, some columns of those that are named."""
        number, start, end = self._places[key]
        file = self._files[number]
        found = {}
        for name in NAMES[self.description.kind]:
            part = file.get_slice(name)
            found[name] = part[start:end, columns[name]] if name in columns else part[start:end]
        return found

    def head(self, rows: slice) -> Tensor:
        """Some rows of the output layer [V, H], where hidden states are stored."""
        return self._head.get_slice("head")[rows]


NAMES = {"hidden": ("hidden",), "dense": ("logits",), "topk": ("ids", "log_probs", "log_rest", "log_min")}
