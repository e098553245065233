"""The models of a recipe's scale.yaml, which gives their sizes alone, as transformers' configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, PretrainedConfig

SHARED = ("vocab_size", "max_position_embeddings")  # of both models, where the scale trains them from nothing


def read_scale(configs: Path) -> dict[str, Any]:
    """The settings of a scale, from its folder."""
    return yaml.safe_load((configs / "scale.yaml").read_text())


def model_of(scale: Mapping[str, Any], role: str) -> PretrainedConfig:
    """Of its `student` or its `teacher`: what the scale does not say is as transformers has it for the type, but that no token begins or
    ends a text."""
    sizes = {name: scale[name] for name in SHARED if name in scale} | scale[role]
    return AutoConfig.for_model(bos_token_id=None, eos_token_id=None, **{name: size for name, size in sizes.items() if name != "name"})
