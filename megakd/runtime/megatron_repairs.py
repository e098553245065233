"""Repairs for megatron-core's distributed optimizer and norms, 0.16.1 to 0.19.2, on CPU and GPU alike.

To save Adam's state as `fully_reshardable` it joins the buckets of a gradient buffer without the padding behind each, and then looks for
each parameter where it lies in the buffer, padding and all: what comes behind padding is saved shifted, and training goes on from other
weights, silently. Overlapped reduction makes several buckets, and so does a tied embedding on several stages, which has one of its own.

Where neither Transformer Engine nor Apex is installed, the optimizer is torch's AdamW, whose per-parameter `step` is mishandled:

    state_dict       asserts that every parameter has stepped, so a fresh optimizer cannot be loaded
    load_state_dict  gives all parameters one shared `step`, which AdamW increments once per parameter: training silently leaves
                     the unbroken run
    _set_main_param_and_optimizer_states   copies the destination's keys, `step` among them: KeyError

and clip_grads reads every norm back to the host, one synchronisation a parameter. With Apex or Transformer Engine this is not touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps

import torch


def install() -> bool:
    """Repair once; True when the repairs for torch's AdamW are in place too."""
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, clip_grads
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if DistributedOptimizer.sharded_param_state_fully_reshardable is not _installed.get("sharded_param_state_fully_reshardable"):
        _repair_buckets(DistributedOptimizer)
    if not USING_PYTORCH_OPTIMIZER:  # asked of megatron: PyPI's `apex` is no NVIDIA's
        return False
    if DistributedOptimizer.state_dict is not _installed.get("state_dict"):
        _repair_distributed_optimizer(DistributedOptimizer)
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = _l2_norm, _scale
    return True


_installed: dict = {}  # ours, by upstream's name


def _repair_buckets(cls) -> None:
    upstream = cls.sharded_param_state_fully_reshardable

    @wraps(upstream)
    def repaired(self, *args, **options):
        with _padding_counted(self.buffers):
            return upstream(self, *args, **options)

    cls.sharded_param_state_fully_reshardable = _installed["sharded_param_state_fully_reshardable"] = repaired


@contextmanager
def _padding_counted(buffers: Sequence) -> Iterator[None]:
    """Buckets count as long as they lie, so that parameters stay in their places when they are joined. Should upstream one day correct its
    places by the padding itself, it finds none, and is right too."""
    buckets = [(bucket, bucket.grad_data.numel()) for buffer in buffers for bucket in buffer.buckets]
    unpadded = [(part, part.numel_unpadded, numel) for part, numel in [(buffer, buffer.numel) for buffer in buffers] + buckets]
    for part, _, numel in unpadded:
        part.numel_unpadded = numel
    try:
        yield
    finally:
        for part, numel, _ in unpadded:
            part.numel_unpadded = numel


def _repair_distributed_optimizer(cls) -> None:
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict

    def repaired_state_dict(self):
        _ensure_adam_state(self.optimizer)
        return state_dict(self)

    def repaired_load_state_dict(self, loaded):
        _ensure_adam_state(self.optimizer)
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    cls.state_dict, cls.load_state_dict = repaired_state_dict, repaired_load_state_dict
    cls._set_main_param_and_optimizer_states = _set_main_param_and_optimizer_states
    _installed["state_dict"] = repaired_state_dict


def _ensure_adam_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[param] = {"step": torch.tensor(0.0), **zeros}


@torch.no_grad()
def _set_main_param_and_optimizer_states(self, model_param, tensors):
    group_index, group_order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group_index]["params"][group_order]
    for name, destination in {"param": main_param, **self.optimizer.state[main_param]}.items():
        if name != "step":  # restored with the parameter groups
            destination.copy_(tensors[name])


def _l2_norm(_chunk_size, _overflow, tensor_lists, _per_tensor):
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensor_lists[0])).float()).reshape(1), None


def _scale(_chunk_size, _overflow, tensor_lists, factor):
    source, destination = tensor_lists
    if source is not destination and any(a.data_ptr() != b.data_ptr() for a, b in zip(source, destination)):
        torch._foreach_copy_(destination, source)
    torch._foreach_mul_(destination, factor)
