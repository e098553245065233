"""Run a function on forked gloo ranks: seconds a test, and nothing is imported twice.

Groups are closed one after the other, and gloo takes some ten milliseconds for each, asleep: a fifth of a second a rank. Nobody waits for
it: the results are there before, and whether ranks have left in order is asked while those of the next call leave, or at the end.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch
import torch.utils.tensorboard

CONTEXT = multiprocessing.get_context("fork")


def run_distributed(fn: Callable, world_size: int, *args, tp: int = 1, pp: int = 1, timeout: float = 180) -> list[Any]:
    """`fn(layout, *args)` on every rank of a TP × PP × DP grid; returns what each rank returned, rank 0 first."""
    have_left(_leaving[:-1])
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
        except BaseException:
            end(ranks)
            raise
    failures = [f"rank {rank}:\n{error}" for rank, (error, _) in sorted(outcome.items()) if error]
    _leaving.append(ranks)
    if failures:
        raise AssertionError("\n".join(failures))
    return [value for _, (_, value) in sorted(outcome.items())]


_leaving: list[list] = []  # ranks of the last two calls, whose results are there
os.register_at_fork(after_in_child=_leaving.clear)  # they are children of this process alone


@atexit.register
def have_left(calls: list[list] = _leaving) -> None:
    """Ranks have a moment to leave by themselves, and have met no error there."""
    failed = [ranks for ranks in calls if end(ranks)]
    _leaving[:] = _leaving[len(calls) :]
    assert not failed, "a rank has not left in order, after its result"


def end(ranks: list) -> bool:
    """Whether one ended with an error."""
    for rank in ranks:
        rank.join(5)
    failed = any(rank.exitcode for rank in ranks)
    for rank in ranks:
        rank.kill()
    return failed


def _receive(results, ranks, timeout: float):
    if not results._reader.poll(timeout):
        raise AssertionError(f"a rank did not answer within {timeout} s; exit codes {[rank.exitcode for rank in ranks]}")
    return results.get()


def _rank(rank: int, world_size: int, folder: str, fn, args, tp: int, pp: int, results) -> None:
    from megakd.runtime.initialize import initialize, leave

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=world_size)
        layout = initialize(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        value = fn(layout, *args)
    except BaseException:
        results.put((rank, (traceback.format_exc(), None)))
    else:
        results.put((rank, (None, value)))
        leave()
