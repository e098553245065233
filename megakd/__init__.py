"""megakd: exact, on-policy knowledge distillation of Hugging Face language models with tensor, pipeline and data parallelism.

    import megakd

    result = megakd.distill(student="models/gpt2", teacher="models/gpt2-xl", train_data="train.jsonl", save="run", epochs=1)

docs/python.md has more. Importing this file imports no torch.
"""

import os
from typing import TYPE_CHECKING

from megakd.runtime.quiet import quiet_megatron

if TYPE_CHECKING:
    from megakd.api import Distilled, distill, evaluate, generate

__version__ = "0.1.0"
__all__ = ["Distilled", "distill", "evaluate", "generate"]

STARTED_BY = os.getppid()  # noted before the libraries' seconds, in which a launcher may end (megakd/runtime/stop.py)
quiet_megatron()  # before anything imports megatron-core, on every rank


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megakd import api

    return getattr(api, name)
