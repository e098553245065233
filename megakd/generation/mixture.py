"""The models that next tokens are drawn from together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.model_provider import context_length


@dataclass(frozen=True)
class MixtureComponent:
    """One model of the mixture Σ share · softmax(z / T) that next tokens are drawn from; the shares of all components sum to 1."""

    model: HiddenStateGPTModel
    share: float = 1.0
    soft_prompt: Tensor | None = None  # [P, H], before every prompt, for this model alone
    prompts: Sequence[Sequence[int]] | None = None  # what it reads in place of the prompts that all are given, one for each of them

    @property
    def context(self) -> int:
        """Positions that its model can be given."""
        return context_length(self.model.hf_config)

    @property
    def soft_length(self) -> int:
        """Positions that its soft prompt takes."""
        return 0 if self.soft_prompt is None else len(self.soft_prompt)
