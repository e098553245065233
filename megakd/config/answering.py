"""What the commands share that let a model answer prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megakd.config.base import BaseConfig
from megakd.config.fields import Group, alias, flag
from megakd.config.parallel import LayoutConfig
from megakd.config.sampling import ResponseConfig


@dataclass(frozen=True, kw_only=True)
class AnsweringConfig(BaseConfig):
    """What the commands share that let a model answer prompts."""

    model: Annotated[str, alias("--model-name-or-path", "--model-path")] = flag(
        "", "folder or native checkpoint that answers", path=True
    )
    soft_prompt: str = flag("", "PEFT's folder of a prompt, as promptkd leaves it: stands before every prompt of --model", path=True)
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "weights and activations; auto: bf16 on a GPU, fp32 on a CPU")
    responses: Group[ResponseConfig] = ResponseConfig()
    parallel: Group[LayoutConfig] = LayoutConfig()

    def validation_errors(self):
        if not self.model:
            yield "--model is missing; give a Hugging Face folder or a native checkpoint"
        if self.responses.temperature == 0:
            yield "--temperature 0 leaves nothing to sample from; give --greedy in its place, the likeliest token each time"

    def unless(self):
        return dict.fromkeys(("temperature", "top_k", "top_p"), (not self.responses.greedy, "beside --greedy"))
