"""What megatron-core 0.16.1 to 0.19 needs to run without a GPU. On a machine with one, `install` does nothing at all.

Nothing here touches numerics or the distributed algorithms. Three kinds of patch, each listed below with its reason:

    TORCH_CUDA   "which device am I on", "wait for it", "its random state"   -> the CPU's answer
    CONSTANTS    the string 'cuda' (or a CUDA tensor type) inside a named megatron function -> the CPU's name.
                 Editing the code object costs nothing per call and copies no upstream code; a TorchFunctionMode would cost
                 microseconds on every operation. A constant that is no longer there raises: version drift is loud.
    FUNCTIONS    two functions that reach into torch.cuda.default_generators

Every replacement is a function object of its own: torch.compile refuses one object under two names.
"""

from __future__ import annotations

import importlib
import logging
import types
from typing import Any

import torch
from megatron.core.package_info import VERSION, __version__

CPU = torch.device("cpu")

TORCH_CUDA = {  # name: (replacement, who needs it)
    "current_device": (lambda: CPU, "receive buffers, gradient buffers, rotary tables, gathers"),
    "set_device": (lambda device=None: None, "launchers"),
    "synchronize": (lambda device=None: None, "checkpoints"),
    "current_stream": (lambda device=None: None, "gradient buffers, from 0.19 on"),
    "manual_seed": (lambda seed: torch.manual_seed(seed), "the tensor-parallel random state tracker"),
    "get_rng_state": (lambda device=None: torch.get_rng_state(), "the tracker, recompute"),
    "set_rng_state": (lambda state, device=None: torch.set_rng_state(state), "recompute"),
}

DEVICE = {"cuda": "cpu"}
TYPES = {f"torch.cuda.{name}": f"torch.{name}" for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor")}

CONSTANTS = [  # (module below megatron.core, function, replacements, why)
    ("pipeline_parallel.schedules", "forward_backward_no_pipelining", DEVICE, "token counter"),
    ("pipeline_parallel.schedules", "forward_backward_pipelining_without_interleaving", DEVICE, "token counter"),
    ("optimizer.optimizer", "FP32Optimizer.__init__", DEVICE, "unit loss scale"),
    ("optimizer.optimizer", "MixedPrecisionOptimizer.__init__", DEVICE, "found_inf and the unit loss scale"),
    ("optimizer.optimizer", "Float16OptimizerWithFloat16Params.__init__", TYPES, "dispatch on param.type()"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.__init__", TYPES, "dispatch on param.type()"),
    ("optimizer.distrib_optimizer", "DistributedOptimizer._build_model_and_main_param_groups", TYPES, "dispatch on param.type()"),
    ("optimizer.clip_grads", "get_grad_norm_fp32", DEVICE, "norm scalars"),
    ("optimizer.clip_grads", "clip_grad_by_total_norm_fp32", DEVICE | TYPES, "assert on grad.type()"),
    ("utils", "local_multi_tensor_l2_norm", DEVICE, "gradient norm without Transformer Engine and Apex"),
    ("dist_checkpointing.strategies.state_dict_saver", "verify_global_md_reuse", DEVICE, "checkpoint metadata"),
    ("dist_checkpointing.exchange_utils", "_get_empty_tensor_for_exchange", DEVICE, "fully parallel load"),
]
if VERSION[:2] >= (0, 19):
    CONSTANTS.append(("optimizer.optimizer", "MegatronOptimizer.has_grad_norm_group", DEVICE, "a flag that ranks add up"))


def _get_rng_state(device="cpu", clone=False, graph_safe=False):
    return torch.get_rng_state()


def _set_rng_state(new_state, device=-1, graph_safe=False):
    torch.set_rng_state(new_state)


FUNCTIONS = [
    ("tensor_parallel.random", "_get_cuda_rng_state", _get_rng_state),
    ("tensor_parallel.random", "_set_cuda_rng_state", _set_rng_state),
]

_undo: list[tuple[Any, str, Any]] = []


def _expected_message(record: logging.LogRecord) -> bool:
    """The tracked generator is the CPU's own here, so megatron's complaint that the CPU state moved is expected."""
    return "CPU RNG state changed" not in record.getMessage()


def install() -> list[str]:
    """Patch megatron-core for the CPU; returns the names patched, none on a GPU machine or when already installed.

    Raises:
        RuntimeError: this megatron-core no longer holds a constant that is listed here.
    """
    if torch.cuda.is_available() or _undo:
        return []
    for name, (replacement, _) in TORCH_CUDA.items():
        _set(torch.cuda, name, replacement)
    _set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)  # tied embeddings over pipeline stages
    for module, function, table, _ in CONSTANTS:
        _patch_constants(module, function, table)
    for module, name, replacement in FUNCTIONS:
        _set(importlib.import_module(f"megatron.core.{module}"), name, replacement)
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_expected_message)
    return [name for _, name, _ in _undo]


def uninstall() -> None:
    """Put everything back."""
    while _undo:
        owner, name, value = _undo.pop()
        setattr(owner, name, value)
    logging.getLogger("megatron.core.tensor_parallel.random").removeFilter(_expected_message)


def _set(owner: Any, name: str, value: Any) -> None:
    _undo.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _patch_constants(module: str, function: str, table: dict[str, str]) -> None:
    target = _resolve(module, function)
    code, hits = _replace_constants(target.__code__, table)
    if not hits:
        uninstall()
        raise RuntimeError(
            f"megatron.core.{module}.{function} no longer holds {sorted(table)}: megatron-core {__version__} is not known; "
            "install megatron-core 0.16.1 or 0.19.2, or review megakd/runtime/cpu_backend.py"
        )
    _set(target, "__code__", code)


def _replace_constants(code: types.CodeType, table: dict[str, str]) -> tuple[types.CodeType, int]:
    replaced = [_replace(constant, table) for constant in code.co_consts]
    hits = sum(n for _, n in replaced)
    return (code.replace(co_consts=tuple(constant for constant, _ in replaced)) if hits else code), hits


def _replace(constant: Any, table: dict[str, str]) -> tuple[Any, int]:
    if isinstance(constant, types.CodeType):
        return _replace_constants(constant, table)
    if isinstance(constant, tuple):
        items = [_replace(item, table) for item in constant]
        return tuple(item for item, _ in items), sum(n for _, n in items)
    return (table[constant], 1) if isinstance(constant, str) and constant in table else (constant, 0)


def _resolve(module: str, qualified_name: str) -> types.FunctionType:
    """The innermost function behind classes, decorators and class methods."""
    found = importlib.import_module(f"megatron.core.{module}")
    for part in qualified_name.split("."):
        found = found.__dict__[part] if isinstance(found, type) else getattr(found, part)
    while not isinstance(found, types.FunctionType) or hasattr(found, "__wrapped__"):
        found = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found.__wrapped__
    return found
