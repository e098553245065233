"""Keep megatron-core's import quiet: without Transformer Engine and Apex it says nineteen times a rank that they are absent."""

import logging
import os
import warnings

FALLBACKS = r"(Transformer Engine|Apex|.*Falling back|.*is not installed|.*not available)"

ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}  # somebody's choice stays


def quiet_megatron() -> None:
    """Silence what is said at import and at set-up; errors and real warnings of a run still come through."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core expects it with tensor + sequence parallelism
    if not ALLOCATOR & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # micro-batches of ever new shapes fragment fixed ones
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # ranks are forked in tests and by checkpoint writers
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message=FALLBACKS)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated")  # megatron-core's calls, said on every rank
    for name in ("megatron", "torch.distributed.checkpoint"):
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
    for name in ("megatron", "torchao", "torch.utils._pytree"):  # torchao, which transformers imports, names kernels of other machines
        logging.getLogger(name).setLevel(logging.ERROR)
