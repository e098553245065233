"""megakd: exact, on-policy knowledge distillation of Hugging Face language models with tensor, pipeline and data parallelism."""

__version__ = "0.1.0"
