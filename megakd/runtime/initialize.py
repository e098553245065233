"""From a bare process to a rank: torch.distributed, process groups, seeds and the device.

`torchrun --nproc_per_node N script.py` gives N ranks; without torchrun the same line is one rank.
"""

from __future__ import annotations

import atexit
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megakd.errors import UserError
from megakd.runtime import cpu_backend, megatron_repairs, weight_gradient
from megakd.runtime.meeting import common_store
from megakd.runtime.parallel_layout import Grid, ParallelLayout, parallel_state
from megakd.runtime.waiting import patient_group, waiting

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}  # what torchrun would say to a single rank

def initialize(
    *, tensor_model_parallel_size: int = 1, pipeline_model_parallel_size: int = 1, seed: int = 1234
) -> ParallelLayout:
    """Join the other ranks and take a place in the TP × PP × DP grid.

    Raises:
        UserError: the number of ranks is not a multiple of TP × PP.
    """
    check_world_size(tensor_model_parallel_size, pipeline_model_parallel_size, int(os.environ.get("WORLD_SIZE", "1")))
    prepare()
    form_groups(tensor_model_parallel_size, pipeline_model_parallel_size)
    layout = ParallelLayout.from_parallel_state()
    seed_everything(seed, layout)
    return layout


def initialize_apart(student: Grid, teacher: Grid, *, seed: int = 1234) -> tuple[ParallelLayout | None, ParallelLayout | None]:
    """Places for two models on ranks of their own: a rank has the one layout or the other. Grids that fit the ranks are the caller's."""
    prepare()
    form_groups(student.tp_size, student.pp_size, ranks=student.size)
    layouts = ParallelLayout.from_parallel_state() if dist.get_rank() < student.size else None, layout_over(teacher)
    seed_everything(seed, layouts[0] or layouts[1])
    return layouts


def prepare() -> None:
    """megatron-core made fit for this machine, and the other ranks joined."""
    cpu_backend.install()
    megatron_repairs.install()
    weight_gradient.install()
    if not dist.is_initialized():
        join()


_layouts: dict[Grid, ParallelLayout | None] = {}  # of this world


def layout_over(grid: Grid) -> ParallelLayout | None:
    """A layout beside that of `initialize`, whose groups are formed once; None outside the grid. Every rank of the job calls it."""
    if grid not in _layouts:
        _layouts[grid] = ParallelLayout.over(grid)
    return _layouts[grid]


def form_groups(tp: int, pp: int, *, ranks: int | None = None) -> None:
    """The process groups of a TP × PP × DP grid over the first ranks, all by default. Those of an earlier call serve again where they are
    the same, else they are closed."""
    shape = (tp, pp, ranks or dist.get_world_size())
    outside = dist.get_rank() >= shape[-1]  # where megatron has no groups to be asked about
    if (outside or parallel_state.model_parallel_is_initialized()) and _shape == [shape]:
        return
    close_groups()
    with with_world_size(shape[-1]):
        parallel_state.initialize_model_parallel(tp, pp, distributed_timeout_minutes=waiting.timeout.total_seconds() / 60)
    _shape[:] = [shape]


_shape: list[tuple[int, int, int]] = []  # TP, PP and ranks of megatron's groups


@contextmanager
def with_world_size(ranks: int) -> Iterator[None]:
    """megatron-core forms groups over all ranks of the job. Here it counts fewer, and all of them take part in forming each group."""
    counted, torch.distributed.get_world_size = torch.distributed.get_world_size, lambda group=None: ranks
    try:
        yield
    finally:
        torch.distributed.get_world_size = counted


def close_groups() -> None:
    """megatron-core forgets its groups without closing them: gloo would keep their threads, NCCL its memory."""
    for group in filter(None, parallel_state._global_process_group_list or ()):  # None stands for the world
        dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def check_world_size(tp: int, pp: int, world_size: int, *, prefix: str = "--", which: str = "rank(s) started", way_out: str = "") -> None:
    """Refuse a grid that does not fit the ranks, before any of them waits for another. A message names `prefix`tensor-model-parallel-size
    and which ranks they are.

    Raises:
        UserError: TP × PP does not divide them.
    """
    if world_size % (tp * pp):
        raise UserError(
            f"{prefix}tensor-model-parallel-size {tp} × {prefix}pipeline-model-parallel-size {pp} = {tp * pp} does not divide the "
            f"{world_size} {which}; {way_out or f'use torchrun --nproc_per_node with a multiple of {tp * pp}'}"
        )


def join() -> None:
    """torch.distributed over nccl where there is a GPU, over gloo where there is none."""
    parallel_state.destroy_model_parallel()  # forget the groups of a world that has ended
    _layouts.clear()
    _shape.clear()
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    alone = os.environ["WORLD_SIZE"] == "1"  # talks to itself, without a port that another program may have taken meanwhile
    store, rank, size = (dist.HashStore(), 0, 1) if alone else common_store(waiting.timeout)
    place = {"store": store, "rank": rank, "world_size": size}
    if torch.cuda.is_available():
        device = torch.device("cuda", own_gpu(int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape of a micro-batch, tens of milliseconds a plan
        dist.init_process_group("nccl", timeout=waiting.timeout, device_id=device, **place)
    else:
        share_cores()
        dist.init_process_group("gloo", timeout=waiting.timeout, **place)


def own_gpu(local_rank: int, visible: int) -> int:
    """The GPU of this rank's number, or the only one: some launchers show each process no more than its own.

    Raises:
        UserError: there are several, and fewer than ranks.
    """
    if local_rank >= visible > 1:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", f"{local_rank + 1} or more")
        raise UserError(f"--nproc_per_node {ranks} is more than the {visible} GPUs of this machine; use {visible} or fewer")
    return local_rank % visible


def share_cores() -> None:
    """Ranks on one CPU machine share its cores: more threads than cores cost more than they give.

    OMP_NUM_THREADS above 1 is somebody's choice and stays. 1 is what torchrun sets where nobody has chosen.
    """
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if local_ranks > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, usable_cores() // local_ranks))


def usable_cores() -> int:
    """taskset or a container may leave a process fewer cores than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seed_everything(seed: int, layout: ParallelLayout, *, iteration: int = 0) -> None:
    """Random numbers for dropout: tensor-parallel ranks agree outside parallel regions (inside, megatron's tracker adds the rank);
    stages, replicas and iterations differ."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    place = layout.pp_rank * layout.dp_size + layout.dp_rank
    mixed = random.Random(f"{seed}/{iteration}/{place}").getrandbits(31)  # neighbours in seed, iteration or place share nothing
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    model_parallel_cuda_manual_seed(mixed, tp_rank=layout.tp_rank, ep_rank=0, etp_rank=layout.tp_rank, force_reset_rng=True)


def resolve_dtype(name: str) -> torch.dtype:
    """`--dtype auto` is bf16 on a GPU and fp32 on a CPU."""
    if name == "auto":
        name = "bf16" if torch.cuda.is_available() else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name]


def on_rank_zero(work: Callable[[], None]) -> None:
    """Do it on rank 0, while the others wait.

    Raises:
        UserError: `work` raised it; on every rank.
    """
    found: list[UserError | None] = [None]
    if is_rank_zero():
        try:
            work()
        except UserError as error:
            found = [error]
    dist.broadcast_object_list(found, group=patient_group())
    if found[0]:
        raise found[0]


def from_rank_zero(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank."""
    found = [make() if is_rank_zero() else None]
    dist.broadcast_object_list(found, group=patient_group())
    return found[0]


def agreed(work: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Do it on every rank; what it returned here. `group` has all ranks.

    Raises:
        UserError: `work` raised it on some rank; on all of them, so that none waits for another.
    """
    result, mine = None, None
    try:
        result = work()
    except UserError as error:
        mine = error
    everyone: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group or patient_group())
    if raised := next(filter(None, [mine, *everyone]), None):
        raise raised
    return result


def is_rank_zero() -> bool:
    """Of the whole run; True as well where torch.distributed is not initialized."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def process_group_closed_at_exit():
    """Leave torch.distributed in order: a rank that exits without goodbye aborts the others' last message.

    Not after an error: under nccl the goodbye would wait for ranks that wait for this one, and the error would never be told.
    """
    yield
    leave()


def leave() -> None:
    """Goodbye to the other ranks, where there are any; the process can join anew."""
    if dist.is_initialized():
        dist.destroy_process_group()
        parallel_state.destroy_model_parallel()


@contextmanager
def among_ranks() -> Iterator[None]:
    """torch.distributed for the block, for whoever calls from a program of their own.

    A process that was started alone is left as it was found. The ranks of a launcher stay together for the next call, and part
    when the program ends, unless an error ends it. What the caller has joined is the caller's to leave.
    """
    if dist.is_initialized():
        yield
    elif "RANK" in os.environ:
        join()
        atexit.register(lambda: hasattr(sys, "last_value") or leave())  # Python keeps there what ended the program
        yield
    else:
        added = ALONE.keys() - os.environ.keys()
        try:
            join()
            yield
        finally:
            leave()
            for name in added:
                os.environ.pop(name, None)
