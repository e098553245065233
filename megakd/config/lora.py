"""Low-rank adapters in place of full fine-tuning; names and meaning are PEFT's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from megakd.config.fields import POSITIVE, SHARE_BELOW_1, alias, flag

DEFAULT_RANK = 8


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """W x + alpha / rank · B A x with W frozen (arXiv 2106.09685): only A and B are trained, saved and exported."""

    peft: Literal["none", "lora"] = flag("none", f"lora: as --lora-rank {DEFAULT_RANK}, unless a rank is given")
    lora_rank: Annotated[int | None, alias("--lora-r")] = flag(None, "train adapters of this rank, not the weights", range=POSITIVE)
    lora_alpha: float = flag(8.0, "adapters are scaled by alpha / rank", range=POSITIVE)
    lora_dropout: float = flag(0.0, "dropout on what an adapter reads", range=SHARE_BELOW_1)
    lora_target_modules: tuple[str, ...] = flag(
        (), "ends of the names of Hugging Face modules (q_proj, c_attn), or all-linear; default: PEFT's for the model's family"
    )
    merge_lora: bool = flag(False, "export the whole model with the adapters in its weights; default: PEFT's folder of the adapters")

    @property
    def rank(self) -> int:
        """0: no adapters, the weights themselves are trained."""
        return self.lora_rank or (DEFAULT_RANK if self.peft == "lora" else 0)

    @property
    def exports_adapter(self) -> bool:
        """Whether a run leaves PEFT's folder, and no whole model."""
        return bool(self.rank) and not self.merge_lora

    def validation_errors(self) -> Iterator[str]:
        """Flags that nothing would read."""
        if self.rank:
            return
        for name in ("lora_alpha", "lora_dropout", "lora_target_modules", "merge_lora"):
            if getattr(self, name) != getattr(LoRAConfig(), name):
                yield f"--{name.replace('_', '-')} is read by adapters only; give --lora-rank too, or leave it out"
