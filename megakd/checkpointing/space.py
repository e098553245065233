"""Room for a checkpoint: asked for before it is written, and told when it did not suffice."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica

from megakd.errors import UserError
from megakd.runtime.initialize import on_rank_zero
from megakd.runtime.waiting import host_group

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BESIDE = 1 << 20  # index, tokenizer, what tells of them
GIB = 1024**3


def bytes_to_write(state: dict) -> int:
    """Of a sharded state, over all ranks of the job; every rank calls it."""
    kinds = (ShardedTensor, ShardedTensorFactory)
    mine = sum(value.data.nbytes for value in nested_values(state) if isinstance(value, kinds) and is_main_replica(value.replica_id))
    total = torch.tensor(mine)
    dist.all_reduce(total, group=host_group())
    return int(total) + BESIDE


def check_room(target: Path, needed: int) -> None:
    """On all ranks, before anything is written.

    Raises:
        UserError: the disk has less room than that.
    """
    on_rank_zero(lambda: _check_room(target, needed))


def _check_room(target: Path, needed: int) -> None:
    place = next(folder for folder in target.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise UserError(f"{target}: a checkpoint takes {needed / GIB:.3f} GiB, and {free / GIB:.3f} GiB are free; free some space")


@contextmanager
def telling_what_is_needed(needed: int) -> Iterator[None]:
    """Around the writing: a quota, or others who write as well, may leave less room than there seemed to be.

    Raises:
        UserError: as it was raised, with the size of a checkpoint where there was no room for one.
    """
    try:
        yield
    except UserError as error:
        if any(os.strerror(number) in str(error) for number in NO_ROOM):  # it may have come from another rank, as its text alone
            raise UserError(f"{error}: a checkpoint takes {needed / GIB:.3f} GiB") from error
        raise
