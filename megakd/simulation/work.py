"""What an operation asks of a GPU: launches, floating-point operations, bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from megakd.simulation.record import Work

FREE = {  # of operations that are no views by their schema, and launch nothing
    "_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "_reshape_alias",
    "alias", "is_same_size", "_assert_async", "sym_size",
}  # fmt: skip
LOOK_UPS = ("embedding", ".index.", "index_select", "gather")
FOREACH = 60  # tensors that one launch of a _foreach operation takes


def asks_nothing(func) -> bool:
    """A view, or room that is not filled."""
    returns = func._schema.returns
    is_view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return bool(is_view) or func._schema.name.split("::")[1] in FREE


def work_of(func, args: tuple, kwargs: dict, out: Any, read: list[Tensor], made: list[Tensor]) -> Work:
    """Every tensor is read or written once."""
    several = "_foreach" in func._schema.name and isinstance(args[0], (list, tuple))
    launches = max(1, len(args[0]) // FOREACH) if several else 1
    return Work(launches, flops_of(func, args, kwargs, out), bytes_of(str(func), args, read, made))


def flops_of(func, args: tuple, kwargs: dict, out: Any) -> float:
    """By torch's own formulas, which know matrix products and attention."""
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0
    sizes = [x for x in args if not isinstance(x, torch.dtype)]  # the product's own type, which the formulas do not know
    return formula(*sizes, **{name: value for name, value in kwargs.items() if name != "out_dtype"}, out_val=out)


def bytes_of(name: str, args: tuple, read: list[Tensor], made: list[Tensor]) -> int:
    """Read and written; of a look-up only what is looked up."""
    if any(part in name for part in LOOK_UPS):
        return 2 * sum(map(size, made))
    if "index_copy_" in name:
        return 2 * size(args[3])
    return sum(map(size, {id(x): x for x in (*read, *made)}.values()))


def size(x: Tensor) -> int:
    """Bytes; what is expanded counts once."""
    return min(x.numel() * x.itemsize, x.untyped_storage().nbytes())
