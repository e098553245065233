"""Run a function on forked gloo ranks: seconds a test, and nothing is imported twice."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("fork")


def run_distributed(fn: Callable, world_size: int, *args, tp: int = 1, pp: int = 1, timeout: float = 180) -> list[Any]:
    """`fn(layout, *args)` on every rank of a TP × PP × DP grid; returns what each rank returned, rank 0 first."""
    with tempfile.TemporaryDirectory() as folder:
        results = CONTEXT.SimpleQueue()
        ranks = [
            CONTEXT.Process(target=_rank, args=(rank, world_size, folder, fn, args, tp, pp, results))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        try:
            outcome = dict(_receive(results, ranks, timeout) for _ in ranks)
        finally:
            for rank in ranks:
                rank.join(5)
                rank.kill()
    failures = [f"rank {rank}:\n{error}" for rank, (error, _) in sorted(outcome.items()) if error]
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, (_, value) in sorted(outcome.items())]


def _receive(results, ranks, timeout: float):
    if not results._reader.poll(timeout):
        raise AssertionError(f"a rank did not answer within {timeout} s; exit codes {[rank.exitcode for rank in ranks]}")
    return results.get()


def _rank(rank: int, world_size: int, folder: str, fn, args, tp: int, pp: int, results) -> None:
    from megakd.runtime.initialize import initialize, process_group_closed_at_exit

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
    try:
        with process_group_closed_at_exit():
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=world_size
            )
            layout = initialize(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
            value = fn(layout, *args)
        results.put((rank, (None, value)))
    except BaseException:
        results.put((rank, (traceback.format_exc(), None)))
