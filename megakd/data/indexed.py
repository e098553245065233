"""Files of token ids as MiniLLM and Megatron write them: `train_0.bin` beside `train_0.idx`, `train_1.bin`, and so on.

    .idx   "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 items n, u64 documents, i32 sizes[n] in ids, i64 offsets[n] in bytes
    .bin   the ids of all items, nothing between them

Within an item the largest number of an unsigned dtype (65535, 4294967295), or -1 of a signed one, stands between prompt and
response; an item without it is text, or in a file of prompts a prompt. EOS is in the file already. The ids stay on disk: one pass
when it is opened finds the prompts' lengths, and a sample is read when it is asked for.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megakd.data.batch import Sample
from megakd.data.text_dataset import report_dropped
from megakd.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4"}  # 6 and 7 are fractions, no ids
HEADER = len(MAGIC) + 8 + 1 + 8 + 8
IDS_AT_ONCE = 2**24  # of the first pass


@dataclass(frozen=True)
class Shard:
    """One pair of files, mapped."""

    path: Path  # of the .bin
    ids: np.ndarray  # [all ids], on disk
    starts: np.ndarray  # [n] int64, where each item begins in `ids`
    sizes: np.ndarray  # [n] int32, separator included
    prompts: np.ndarray  # [n] int32, ids before the separator; -1 where there is none


class IndexedDataset(Sequence[Sample]):
    """The items of all shards whose prompt has at most `max_prompt_length` ids, as Samples of at most `max_length`; with
    `prompts_only` the prompts alone.

    Raises UserError where the files cannot be used, hold ids from `vocab_size` on, or no item is left.
    """

    def __init__(
        self, path: Path, *, vocab_size: int, max_length: int, max_prompt_length: int, prompts_only: bool = False
    ) -> None:
        self.max_length, self.prompts_only = max_length, prompts_only
        self.shards = [open_shard(file, vocab_size) for file in shard_files(path)]
        lengths = np.concatenate([self._prompt_lengths(shard) for shard in self.shards])
        report_dropped(path, lengths, max_prompt_length)
        self.kept = np.flatnonzero(lengths <= max_prompt_length)
        self.first = np.cumsum([0, *(len(shard.sizes) for shard in self.shards)])  # number of each shard's first item

    def _prompt_lengths(self, shard: Shard) -> np.ndarray:
        """An item without separator has no prompt; where prompts are wanted it is one."""
        return np.where(shard.prompts >= 0, shard.prompts, shard.sizes if self.prompts_only else 0)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        prompt, response = split_item(*self._place(index))
        if self.prompts_only:
            return Sample(index, prompt or response, ())
        return Sample(index, prompt, response[: self.max_length - len(prompt)])

    def where(self, index: int) -> str:
        """File and item, as in messages."""
        shard, item = self._place(index)
        return f"{shard.path} item {item}"

    def _place(self, index: int) -> tuple[Shard, int]:
        """The shard of a sample, and which of its items it is."""
        item = int(self.kept[index])
        number = int(np.searchsorted(self.first, item, side="right")) - 1
        return self.shards[number], item - int(self.first[number])


def split_item(shard: Shard, item: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids before and after the separator; of text, none and all."""
    start, size, prompt = int(shard.starts[item]), int(shard.sizes[item]), int(shard.prompts[item])
    ids = shard.ids[start : start + size]
    return tuple(ids[: max(prompt, 0)].tolist()), tuple(ids[prompt + 1 :].tolist())


def is_indexed(path: str | Path) -> bool:
    """By the name alone."""
    return Path(path).suffix in (".bin", ".idx")


def shard_files(path: Path) -> Iterator[Path]:
    """`train_0.bin` and the files that count on from it; another name is one file."""
    numbered = re.fullmatch(r"(.*_)(\d+)", path.stem)
    yield path.with_suffix(".bin")
    number = int(numbered[2]) + 1 if numbered else 0
    while numbered and (file := path.with_name(f"{numbered[1]}{number}.bin")).is_file():
        yield file
        number += 1


def open_shard(path: Path, vocab_size: int) -> Shard:
    """Raises UserError where a file is missing, the two do not fit, or an id is `vocab_size` or more."""
    index = path.with_suffix(".idx")
    for file in (path, index):
        if not file.is_file():
            raise UserError(f"{file}: no such file; token data are a .bin and the .idx beside it")
    dtype, sizes, offsets = read_index(index)
    starts, count = offsets // dtype.itemsize, path.stat().st_size // dtype.itemsize
    if not len(sizes) or int((starts + sizes).max()) > count:
        raise UserError(f"{index} names {len(sizes)} items beyond the {count} ids of {path.name}; make both files again")
    ids = np.memmap(path, dtype=dtype, mode="r")
    return Shard(path, ids, starts, sizes, prompt_lengths(path, ids, starts, vocab_size))


def read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """dtype of the ids, sizes in ids, offsets in bytes."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    head = data[:HEADER].tobytes()
    if len(head) < HEADER or not head.startswith(MAGIC):
        raise UserError(f"{path} does not begin like an index of token data; give what MiniLLM's or Megatron's tools wrote")
    code, items = head[len(MAGIC) + 8], int.from_bytes(head[len(MAGIC) + 9 : len(MAGIC) + 17], "little")
    if code not in DTYPES:
        raise UserError(f"{path} has dtype code {code}, which is no whole number; token ids have {', '.join(map(str, DTYPES))}")
    if len(data) < HEADER + 12 * items:
        raise UserError(f"{path} ends before its {items} items do; make it again")
    sizes = data[HEADER : HEADER + 4 * items].view("<i4")
    return np.dtype(DTYPES[code]), sizes, data[HEADER + 4 * items : HEADER + 12 * items].view("<i8")


def prompt_lengths(path: Path, ids: np.ndarray, starts: np.ndarray, vocab_size: int) -> np.ndarray:
    """Ids before each item's first separator, -1 where there is none; and every other id is one of the tokenizer's."""
    separator = np.array(-1).astype(ids.dtype)
    lengths = np.full(len(starts), -1, dtype=np.int32)
    for first in range(0, len(ids), IDS_AT_ONCE):
        part = ids[first : first + IDS_AT_ONCE]
        separates = part == separator
        largest = part.max(where=~separates, initial=0)
        if largest >= vocab_size:
            raise UserError(f"{path} holds the id {largest}, the tokenizer {vocab_size}; give data of this model's tokenizer")
        positions = np.flatnonzero(separates) + first
        items = np.searchsorted(starts, positions, side="right") - 1
        unseen = lengths[items] < 0
        items, positions = items[unseen], positions[unseen]
        items, earliest = np.unique(items, return_index=True)
        lengths[items] = positions[earliest] - starts[items]
    return lengths
