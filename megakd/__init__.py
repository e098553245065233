"""megakd: exact, on-policy knowledge distillation of Hugging Face language models with tensor, pipeline and data parallelism."""

from megakd.runtime.quiet import quiet_megatron

__version__ = "0.1.0"

quiet_megatron()  # before anything imports megatron-core, on every rank
