"""The command that writes a teacher's targets: scripts/cache_teacher.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megakd.config.base import BaseConfig
from megakd.config.conditioning import ConditioningConfig
from megakd.config.fields import POSITIVE, Group, alias, flag
from megakd.config.parallel import LayoutConfig
from megakd.config.teacher import QUANTIZE_HELP, Quantization
from megakd.config.train import DataConfig


@dataclass(frozen=True, kw_only=True)
class CacheConfig(BaseConfig):
    """What a teacher says of every response of the data, written once, so that training loads no teacher. The same command continues it.

    torchrun --nproc_per_node 2 scripts/cache_teacher.py --teacher-model TEACHER --train-data train.jsonl --valid-data valid.jsonl
    --save targets

    then pretrain_kd.py --method kd --teacher-cache targets, with the same data, lengths and template, at any layout.
    """

    teacher_model: Annotated[str, alias("--teacher-model-name-or-path", "--teacher-model-path")] = flag(
        "", "the teacher's folder", path=True
    )
    model: Annotated[str, alias("--model-name-or-path", "--model-path")] = flag(
        "", "the student's folder, where its chat template, end or vocabulary is not the teacher's; its weights are not read", path=True
    )
    cache_kind: Literal["hidden", "dense", "topk"] = flag(
        "hidden",
        "hidden: hidden states and, once, the output layer, exact; dense: every token's logit, exact; topk: --top-k log-probabilities and "
        "the mass of the rest, whose bias is logged. A position is so many numbers: hidden_size, vocab_size, 2 × K + 2",
    )
    top_k: int = flag(64, "tokens of a position that topk keeps", range=POSITIVE)
    teacher_quantize: Quantization = flag("none", QUANTIZE_HELP)
    data: Group[DataConfig] = DataConfig()
    conditioning: Group[ConditioningConfig] = ConditioningConfig()
    parallel: Group[LayoutConfig] = LayoutConfig()
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "weights, activations, and what is stored; auto: bf16 on a GPU, fp32 on a CPU")
    micro_batch_size: Annotated[int, alias("--mbs")] = flag(8, "rows of one forward pass on one rank", range=POSITIVE)
    file_mib: int = flag(256, "MiB of one file: what a kill costs at most; each replica writes a file at a time", range=POSITIVE)
    save: Annotated[str, alias("--output-dir")] = flag("", "folder to write", path=True)

    def validation_errors(self):
        if not self.teacher_model:
            yield "--teacher-model is missing; give the teacher's folder"
        if not (self.data.train_data or self.data.valid_data):
            yield "--train-data is missing; give the data that will be learnt, and --valid-data where held-out losses are wanted"
        if not self.save:
            yield "--save is missing; name the folder to write"
        if self.data.max_prompt_length >= self.data.max_length:
            yield (
                f"--max-prompt-length {self.data.max_prompt_length} leaves no room for a response in --max-length {self.data.max_length}; "
                "lower it"
            )
        yield from self.conditioning.validation_errors()

    def unless(self):
        return {"top_k": (self.cache_kind == "topk", "without --cache-kind topk")}
