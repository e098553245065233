"""What PromptKD's published code does otherwise, each by its name: `--reference-behaviour mean-of-means ...`, or all of it.

docs/fidelity.md has the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ReferenceCompat:
    """Which of them a run does."""

    mean_of_means: bool = False  # a loss is the mean of the micro-batches' means
    zero_lr_start: bool = False  # the first iteration's learning rate is 0
    lost_last_step: bool = False  # a run that accumulates gradients ends one optimizer step early
    decay_norms: bool = False  # norms have weight decay, but for GPT-2's
    teacher_dropout: bool = False  # the teacher has dropout while the soft prompt learns
    special_tokens_in_prompt: bool = False  # the soft prompt begins with the tokenizer's special tokens
    forced_eos: bool = False  # a response that was cut off ends nevertheless
    whiten_padding: bool = False  # padding counts when advantages are whitened
    seqkd_with_kd: bool = False  # SeqKD has KD's share of the divergence

    @classmethod
    def asked_for(cls, names: Collection[str]) -> ReferenceCompat:
        """From the words of --reference-behaviour."""
        return cls(**{line.name: spelling in names or "all" in names for line, spelling in zip(dataclasses.fields(cls), NAMES)})


NAMES = tuple(line.name.replace("_", "-") for line in dataclasses.fields(ReferenceCompat))
ReferenceBehaviour = Literal[("all", *NAMES)]
