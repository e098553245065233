"""The word embedding of a batch with a soft prompt in front."""

from .operator import prompt_embedding

__all__ = ["prompt_embedding"]
