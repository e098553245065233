"""Ranks that were started again meet each other, and nobody who has died."""

from __future__ import annotations

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megakd.errors import LostRankError
from megakd.runtime.meeting import be_welcomed, welcome_all

SOON = datetime.timedelta(seconds=10)


def attempt(store, size: int) -> str:
    """All ranks of one attempt, in any order; the name that they agree on."""
    with ThreadPoolExecutor(size) as ranks:
        others = [ranks.submit(be_welcomed, store, rank) for rank in range(1, size)]
        names = {rank.result() for rank in [ranks.submit(welcome_all, store, size, SOON), *others]}
    assert len(names) == 1
    return names.pop()


@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 2), (1, 2)])
def test_every_attempt_has_a_name_of_its_own_in_a_store_that_outlives_it(sizes):
    store = dist.HashStore()
    names = [attempt(store, size) for size in sizes]
    assert len(set(names)) == len(sizes)


def test_a_rank_that_died_before_it_was_welcomed_is_not_taken_for_one_that_lives():
    store = dist.HashStore()
    store.set("hello/1", "of a rank that has died")
    with pytest.raises(LostRankError, match=r"of 2 ranks \[1\] have not come"):
        welcome_all(store, 2, datetime.timedelta(seconds=0.2))
    assert attempt(store, 2)
