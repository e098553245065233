"""Collectives and sends: nothing travels, each is noted with its group, bytes and order."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megakd.simulation.record import Message, Work
from megakd.simulation.where import where

if TYPE_CHECKING:
    from megakd.simulation.device import Device

HOST_MESSAGE_S = 20e-6
LARGEST_SIDE = ("_allgather_base_", "_reduce_scatter_base_")  # of input and output the larger one is what a ring moves
HOST_GROUPS: set[str] = set()  # names of groups that were formed over gloo: CPU tensors are theirs


def pretend_to_send(device: Device, func, args: tuple, kwargs: dict, fakes: list[Tensor], real: list[Tensor]) -> Any:
    """Note it; what comes back is what was there."""
    name = func._schema.name.split("::")[1]
    group = group_of(args, kwargs)
    ranks = tuple(dist.get_process_group_ranks(group)) if group is not None else ()
    by_host = bool(real) and not fakes
    if real and name != "barrier" and not (by_host and (is_of_objects() or id_of(group) in HOST_GROUPS)):
        device.record.complaints[f"NCCL: a CPU tensor in {name}, at {where()}"] += 1
    if fakes and id_of(group) in HOST_GROUPS:
        device.record.complaints[f"gloo: a GPU's tensor in {name}, at {where()}"] += 1
    sizes = [x.numel() * x.itemsize for x in fakes or real]
    size = max(sizes, default=0) if name in LARGEST_SIDE else sum(sizes)
    peer = next((x for x in args if isinstance(x, int) and not isinstance(x, bool)), None) if name in ("send", "recv_") else None
    device.record.messages.append(Message(device.record.part, name, ranks, peer, size, by_host))
    if by_host:
        device.forbid_in_graph("a message of objects")
        return func(*args, **kwargs)  # torch's fake groups copy what they can
    seconds = device.card.message_seconds(size, len(ranks), both_ways=name == "allreduce_")
    work = device.work
    work += Work(messages=1, message_bytes=size, message_s=seconds, host_s=HOST_MESSAGE_S)
    handle = torch._C._distributed_c10d.FakeWork().boxed()
    return handle if len(func._schema.returns) == 1 else (args[0], handle)


def group_of(args: tuple, kwargs: dict) -> dist.ProcessGroup | None:
    """The operation's process group."""
    boxed = (x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()))
    return next(map(dist.ProcessGroup.unbox, boxed), None)


def id_of(group: dist.ProcessGroup | None) -> str | None:
    """Its name, which is its own."""
    return group.group_name if group is not None else None


def is_of_objects() -> bool:
    """Whether torch sends pickled objects, which it moves to the device itself."""
    frame = sys._getframe(1)
    for _ in range(12):
        if frame is None:
            return False
        if "object" in frame.f_code.co_name and "torch/distributed" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
