"""torch.cuda and torch.distributed as they would answer on a GPU among others; what fake tensors cannot do is put in its place, too.

Nothing of megakd or megatron-core is changed. Each entry says why it is needed; all of it is for a process that ends with the simulation.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import optimizer as torch_optimizer
from torch.testing._internal.distributed.fake_pg import FakeStore

from megakd.simulation.device import Device, as_read
from megakd.simulation.messages import HOST_GROUPS

aten = torch.ops.aten
FLASH_WIDTH = 256  # a head's, at most
ALIGNED = 8  # columns of a mask: of other widths it is copied
PER_NODE = 8
RANDOM_STATE = torch.zeros(16, dtype=torch.uint8)
OF_FAKES = {  # attributes that are a fake tensor's own
    "fake_mode", "fake_device", "constant", "real_tensor", "pytype", "dispatch_keys", "item_memo", "nonzero_memo", "unique_memo",
    "nested_int_memo",
}  # fmt: skip


def install(device: Device, rank: int, world_size: int) -> None:
    """This process is `rank` of so many, each with a GPU."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank % PER_NODE)}
    for name, answer in answers(device).items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    fake_tensors(device)
    fake_groups(rank, world_size)


def answers(gpu: Device) -> dict[str, object]:
    """By name in torch.cuda."""
    return {
        "is_available": lambda: True,
        "device_count": lambda: PER_NODE,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device="cuda": RANDOM_STATE.clone(),
        "set_rng_state": lambda new_state, device="cuda": None,
        "_lazy_init": lambda: None,
        "is_current_stream_capturing": lambda: gpu.recording is not None,
        "max_memory_allocated": lambda device=None: max(gpu.record.peaks.values(), default=0),
        "memory_allocated": lambda device=None: gpu.memory.live,
        "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=132),  # of an H100 and an H200
        "Stream": lambda *_, **__: Stream(gpu),
        "current_stream": lambda device=None: Stream(gpu),
        "stream": lambda stream: stream,
        "CUDAGraph": lambda: Graph(gpu),
        "graph": capture,
    }


class Stream(nullcontext):
    """torch.cuda.Stream: there is one, in whose order all is done."""

    def __init__(self, device: Device):
        super().__init__()
        self.synchronize = lambda: device.wait("synchronize")
        self.wait_stream = self.wait_event = lambda other: None


class Graph:
    """torch.cuda.CUDAGraph: what a replay asks of the device."""

    def __init__(self, device: Device):
        self.device, self.recorded = device, None

    def replay(self) -> None:
        """As torch's."""
        self.device.replay(self.recorded)


@contextmanager
def capture(graph: Graph, pool=None, stream=None, capture_error_mode="global"):
    """torch.cuda.graph."""
    with graph.device.capture() as recorded:
        yield
    graph.recorded = recorded


def fake_tensors(device: Device) -> None:
    """What fake tensors cannot do, or do as a CPU would."""
    torch.Tensor.tolist = FakeTensor.tolist = tolist_of(device)
    FakeTensor.data_ptr = lambda tensor: tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.itemsize
    FakeTensor.__reduce_ex__ = lambda tensor, protocol: as_read(tensor).__reduce_ex__(protocol)  # pickled: checkpoints
    F.scaled_dot_product_attention = attention_on(device)
    F.rms_norm = rms_norm
    torch._C._set_only_lift_cpu_tensors(True)
    nn.Module._apply = apply_to_module
    torch_optimizer._foreach_supported_types.append(FakeTensor)


def tolist_of(device: Device):
    """Tensor.tolist, which reads memory without an operation."""
    original = torch._C.TensorBase.tolist

    def tolist(self):
        if not isinstance(self, FakeTensor):
            return original(self)
        device.wait("tolist")
        return original(as_read(self))

    return tolist


def attention_on(device: Device):
    """torch's choice on a GPU: flash without a mask, memory-efficient with one; a CPU's build would not offer them."""
    original = F.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        rest = {"scale": scale, "enable_gqa": enable_gqa}
        if not isinstance(query, FakeTensor):
            return original(query, key, value, attn_mask, dropout_p, is_causal, **rest)
        if not query.dtype == key.dtype == value.dtype:  # as torch's own check, which these kernels' shapes leave out
            raise RuntimeError(f"query, key and value have the dtypes {query.dtype}, {key.dtype} and {value.dtype}")
        if query.dtype in (torch.bfloat16, torch.float16) and attn_mask is None and query.shape[-1] <= FLASH_WIDTH:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        if enable_gqa:  # the others take no fewer key heads: scores in memory
            return original(query, key, value, attn_mask, dropout_p, is_causal, **rest)
        mask = attn_mask if attn_mask is None else aligned(device, attn_mask, query, key)
        keeps = torch.is_grad_enabled() and query.requires_grad
        return aten._scaled_dot_product_efficient_attention(query, key, value, mask, keeps, dropout_p, is_causal, scale=scale)[0]

    return attention


def aligned(device: Device, mask, query, key):
    """The mask as that kernel needs it; a complaint where it has to be copied for it."""
    if mask.shape[-1] % ALIGNED:
        device.complain(f"slow: an attention mask whose width is no multiple of {ALIGNED} is copied in every layer")
        mask = F.pad(mask, (0, ALIGNED - mask.shape[-1] % ALIGNED))[..., : mask.shape[-1]]
    return mask.expand(*query.shape[:3], key.shape[2])


def rms_norm(x, shape, weight=None, eps=None, original=F.rms_norm):
    """One kernel on a GPU; a fake tensor would keep the composite's float32 copies. LayerNorm moves as many bytes."""
    return F.layer_norm(x, shape, weight, None, eps) if isinstance(x, FakeTensor) else original(x, shape, weight, eps)


def apply_to_module(self, fn, recurse=True):
    """nn.Module._apply swaps parameters in place, which the weak references to fake ones forbid."""
    for child in self.children():
        child._apply(fn)
    for table in (self._parameters, self._buffers):
        for name, old in [(name, x) for name, x in table.items() if x is not None]:
            with torch.no_grad():
                new = fn(old)
            table[name] = as_parameter(new, old) if table is self._parameters and new is not old else new
    return self


def as_parameter(new, old: nn.Parameter) -> nn.Parameter:
    """`new` in the place of `old`, with the attributes that megatron put there."""
    param = nn.Parameter(new, old.requires_grad)
    for key, value in vars(old).items():
        if not key.startswith("_") and key not in OF_FAKES:
            setattr(param, key, value)
    return param


def fake_groups(rank: int, world_size: int) -> None:
    """All process groups are torch's fake ones; which were asked for over gloo is kept, for CPU tensors are theirs alone."""
    new_group = dist.new_group

    def faked(*args, **options):
        asked = options.get("backend")
        group = new_group(*args, **{**options, "backend": "fake"})
        if asked == "gloo" and isinstance(group, dist.ProcessGroup):
            HOST_GROUPS.add(group.group_name)
        return group

    dist.new_group = torch.distributed.new_group = faked
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
