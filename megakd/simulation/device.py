"""Operations as a GPU would be asked for them: those on the CPU run, those on the device become shapes; each is looked at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megakd.simulation.cards import HOST_LAUNCH_S, Card
from megakd.simulation.memory import Memory
from megakd.simulation.messages import pretend_to_send
from megakd.simulation.record import Record, Work
from megakd.simulation.where import where
from megakd.simulation.work import asks_nothing, work_of

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.item.default)
MOVES = (aten._to_copy.default, aten.copy_.default)
REPLAY_S, REPLAYED_LAUNCH_S, RECORDED_LAUNCH_S = 10e-6, 0.4e-6, 2e-6  # of the host: a graph, and each of its launches


class Device(TorchDispatchMode):
    """The mode that a simulated rank runs under."""

    def __init__(self, record: Record, card: Card):
        super().__init__()
        self.record, self.card = record, card
        self.memory = Memory(record)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.recording: Work | None = None  # of the graph that is being captured

    # ---- what is noted

    @contextmanager
    def part(self, name: str):
        """All that is asked for in the block belongs to this part of the run."""
        before, self.record.part = self.record.part, name
        self.memory.look()
        try:
            yield
        finally:
            self.record.part = before

    @property
    def work(self) -> Work:
        """What an operation is charged to: the graph in the making, or the part in hand."""
        return self.record.parts[self.record.part] if self.recording is None else self.recording

    def wait(self, what: str) -> None:
        """The host waits for the device."""
        self.record.waits[self.record.part, what, where()] += 1
        self.forbid_in_graph(what)

    def forbid_in_graph(self, what: str) -> None:
        """A complaint, if a graph is being captured."""
        if self.recording is not None:
            self.complain(f"in a CUDA graph: {what}")

    def complain(self, what: str) -> None:
        """A GPU would refuse this, or do it badly."""
        self.record.complaints[f"{what}, at {where()}"] += 1

    @contextmanager
    def capture(self):
        """Operations of the block are recorded into a graph; yields the work of a replay."""
        self.wait("graph capture")
        self.record.captures += 1
        self.recording = recorded = Work()
        try:
            yield recorded
        finally:
            self.recording = None
            self.work.host_s += recorded.host_s + RECORDED_LAUNCH_S * recorded.launches

    def replay(self, recorded: Work) -> None:
        """A graph once more."""
        host_s = REPLAY_S + REPLAYED_LAUNCH_S * recorded.launches
        work = self.work
        work += Work(**{**vars(recorded), "host_s": host_s})

    # ---- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        real = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeTensor)]
        if func.namespace == "c10d":
            return pretend_to_send(self, func, args, kwargs, fakes, real)
        made_there = is_cuda(kwargs.get("device"))
        if not fakes and not made_there:
            return func(*args, **kwargs)
        if is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        if func in READS:
            self.wait("item")
            return number_for(fakes[0])
        if func is aten.equal.default:
            self.wait("equal")
            return True
        if func is aten.cumsum.default and torch.are_deterministic_algorithms_enabled() and fakes[0].is_floating_point():
            self.complain("cumsum of floating point has no deterministic algorithm")  # of torch's list the one that models use
        if func is aten.bincount.default:
            return self.counted(*args, **kwargs)
        moved = self.transfer(func, args, kwargs) if func in MOVES else None
        return self.compute(func, args, kwargs, fakes, real) if moved is None else moved

    def compute(self, func, args, kwargs, fakes: list[FakeTensor], real: list[Tensor]) -> Any:
        """An operation on the device: its result's shape."""
        if fakes and (indices := [x for x in real if x.ndim > 0]):
            self.complain(f"CPU tensor {tuple(indices[0].shape)} in {func}")  # one number alone travels as an argument
        try:
            with self.fake:
                out = func(*args, **kwargs)
        except Exception as error:
            self.complain(f"{type(error).__name__} in {func}: {str(error).splitlines()[0][:160]}")
            raise
        made = [x for x in tree_leaves(out) if isinstance(x, FakeTensor)]
        for x in made if func.overloadpacket is aten.ne else ():
            x.says_unequal = True
        for x in made:
            self.memory.watch(x) if x.is_cuda else self.complain(f"a CPU tensor out of {func}")
        self.charge(func, args, kwargs, out, fakes, made)
        return out

    def counted(self, numbers: FakeTensor, weights: None = None, minlength: int = 0) -> FakeTensor:
        """How often each number occurs: the host waits for the largest, and reads that all occur alike."""
        self.wait("bincount")
        with self.fake:
            out = torch.empty(minlength, dtype=torch.int64, device="cuda:0")
        self.memory.watch(out)
        out.counts = numbers.numel()
        return out

    def charge(self, func, args, kwargs, out, fakes, made) -> None:
        """Its launches, operations, bytes and time, to the part in hand."""
        if asks_nothing(func):
            return
        asked = work_of(func, args, kwargs, out, fakes, made)
        dtype = next((x.dtype for x in fakes if x.is_floating_point()), torch.float32)
        asked.device_s = self.card.seconds(asked.flops, asked.bytes, dtype)
        asked.host_s = HOST_LAUNCH_S * asked.launches
        work = self.work
        work += asked

    def transfer(self, func, args, kwargs) -> Tensor | None:
        """A copy between host and device; None where it is none."""
        if func is aten.copy_.default:
            target, source, *rest = args
            return self._copy_into(target, source, bool(rest[0]) if rest else kwargs.get("non_blocking", False))
        source, device = args[0], kwargs.get("device")
        if isinstance(source, FakeTensor):
            if device is None or is_cuda(device):
                return None
            self.wait("copy to host")
            return as_read(source, kwargs.get("dtype"))
        self._to_device(kwargs.get("non_blocking", False))
        return self._made_there(source, kwargs.get("dtype"), func)

    def _copy_into(self, target: Tensor, source: Tensor, non_blocking: bool) -> Tensor | None:
        there, here = isinstance(target, FakeTensor), isinstance(source, FakeTensor)
        if here and not there:
            self.wait("copy to host")
            return target.copy_(as_read(source, target.dtype))
        if there and not here:
            self._to_device(non_blocking)
            return target
        return None

    def _to_device(self, non_blocking: bool) -> None:
        self.record.copies[self.record.part, where()] += 1
        if non_blocking:
            self.forbid_in_graph("copy from the host")
        else:
            self.wait("copy to device")

    def _made_there(self, source: Tensor, dtype: torch.dtype | None, func: Callable) -> FakeTensor:
        with self.fake:
            out = torch.empty_strided(source.shape, source.stride(), dtype=dtype or source.dtype, device="cuda:0")
        self.memory.watch(out)
        return out


def is_made_of_others(func) -> bool:
    """Whether it only calls others. So it comes under torch.inference_mode, which has no autograd to take it apart."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def is_cuda(device: Any) -> bool:
    """Whether an operation's `device` is the GPU."""
    return device is not None and torch.device(device).type == "cuda"


def number_for(x: Tensor) -> bool | int | float:
    """What the host reads of a device's number: 1. As a token it ends no response. Numbers that are compared are equal."""
    if hasattr(x, "says_unequal"):
        return False
    return True if x.dtype == torch.bool else 1.0 if x.is_floating_point() else 1


def as_read(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The same of a tensor; of counts, that all are alike."""
    read = torch.ones(tuple(x.shape), dtype=dtype or x.dtype)
    if hasattr(x, "counts"):
        each, more = divmod(x.counts, len(x))
        read = read * each + (torch.arange(len(x)) < more)
    return read
