"""Which line of megakd or megatron-core asks."""

from __future__ import annotations

import sys
from pathlib import Path

import megatron.core

import megakd

ROOTS = {f"{Path(next(iter(module.__path__))).resolve()}/": name for module, name in ((megakd, ""), (megatron.core, "megatron: "))}
OWN = str(Path(__file__).resolve().parent)


def where(depth: int = 2) -> str:
    """The innermost lines, `file:line < file:line`, without those of the simulation."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < depth:
        file = frame.f_code.co_filename
        root = next((root for root in ROOTS if file.startswith(root)), None)
        if root and not file.startswith(OWN):
            found.append(f"{ROOTS[root]}{file.removeprefix(root)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "?"
