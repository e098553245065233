"""From a bare process to a rank: which cores and which GPU it takes, and that what it has joined it leaves."""

from __future__ import annotations

import os

import pytest
import torch

from megakd.runtime.initialize import share_cores


@pytest.mark.parametrize(
    "local_ranks, asked, threads",
    [("1", None, None), ("2", None, 3), ("4", None, 1), ("8", None, 1), ("2", "1", 3), ("2", "5", None)],
    ids=["alone", "2 ranks", "4 ranks", "more ranks than cores", "torchrun's 1", "the user's 5"],
)
def test_ranks_share_the_cores_they_may_use_unless_told_otherwise(monkeypatch, local_ranks, asked, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    share_cores()
    assert taken == ([] if threads is None else [threads])
