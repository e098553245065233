"""The command that answers: scripts/generate.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megakd.config.answering import AnsweringConfig
from megakd.config.fields import SEED, alias, flag


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AnsweringConfig):
    """Answers to the prompts of a jsonl file, into a jsonl file that can be trained on as it is. The same command continues it.

    torchrun --nproc_per_node 2 scripts/generate.py --model TEACHER --data train.jsonl --save seqkd.jsonl
    """

    data: str = flag("", "jsonl file with prompt, or with instruction and input", path=True)
    save: Annotated[str, alias("--output")] = flag("", "jsonl file to write: the fields of --data, and response", path=True)
    seed: int = flag(1234, "of sampling; no result depends on the layout or the batch size", range=SEED)
    token_ids: bool = flag(False, "write prompt_ids and response_ids too")

    def validation_errors(self):
        yield from super().validation_errors()
        if not self.data:
            yield "--data is missing; give a jsonl file with prompts"
        if not self.save:
            yield "--save is missing; name the jsonl file to write"
