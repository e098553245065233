"""Gloo ranks that know torch only, so that these tests hold for the package by itself. On a GPU all of them share it."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """fn(tp_group, *args) on every rank; what each returned, rank 0 first. A rank's exception is an AssertionError here."""
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")  # CUDA survives no fork
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(r, world_size, folder, fn, args, results)) for r in range(world_size)]
        for rank in ranks:
            rank.start()
        outcome = {}
        while len(outcome) < world_size and results._reader.poll(timeout):
            rank, error, value = results.get()
            assert error is None, f"rank {rank}:\n{error}"
            outcome[rank] = value
        for rank in ranks:
            rank.join(5)
            rank.kill()
    assert len(outcome) == world_size, f"only ranks {sorted(outcome)} answered within {timeout} s"
    return [outcome[rank] for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple, results: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        results.put((rank, None, fn(dist.group.WORLD, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
