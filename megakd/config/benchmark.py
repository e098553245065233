"""The commands that measure whole iterations: scripts/benchmark.py takes one apart, scripts/benchmark_systems.py compares systems."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Literal

from megakd.config.base import BaseConfig
from megakd.config.fields import POSITIVE, SEED, Group, alias, flag
from megakd.config.parallel import ParallelConfig

SYSTEMS = ("megakd", "megakd-tp2", "megakd-pp2", "megakd-dp2", "transformers", "liger", "trl", "trl-recompute")
PRESETS = {  # layers and hidden size of student and teacher
    "gpt2-small-cpu": ((6, 384), (12, 512)),
    "gpt2-base": ((12, 768), (24, 1024)),
    "gpt2-xl": ((12, 768), (48, 1600)),
}


@dataclass(frozen=True, kw_only=True)
class SizesConfig(BaseConfig):
    """A student and a teacher with random weights."""

    preset: Literal["gpt2-small-cpu", "gpt2-base", "gpt2-xl"] = flag(
        "gpt2-small-cpu", "student and teacher of 6×384 and 12×512, 12×768 and 24×1024, 12×768 and 48×1600 (layers × hidden size)"
    )
    student_layers: int | None = flag(None, "instead of the preset's", range=POSITIVE)
    student_hidden: int | None = flag(None, "instead of the preset's; heads are of 64", range=POSITIVE)
    teacher_layers: int | None = flag(None, "instead of the preset's", range=POSITIVE)
    teacher_hidden: int | None = flag(None, "instead of the preset's; heads are of 64", range=POSITIVE)
    vocab_size: int | None = flag(None, "default: the tokenizer's, or GPT-2's 50257", range=POSITIVE)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Layers and hidden size of `student` and `teacher`."""
        student, teacher = PRESETS[self.preset]
        return {
            "student": (self.student_layers or student[0], self.student_hidden or student[1]),
            "teacher": (self.teacher_layers or teacher[0], self.teacher_hidden or teacher[1]),
        }

    def validation_errors(self):
        """What cannot be, one line each."""
        for name, (_, hidden) in self.sizes.items():
            if hidden > 64 and hidden % 64:
                yield f"--{name}-hidden {hidden} is not a multiple of 64, the size of a head; make it one"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(SizesConfig):
    """One PromptKD iteration taken apart, of random models, on its own or beside transformers and PEFT in turn.

    python scripts/benchmark.py --preset gpt2-small-cpu --baseline hf --data dolly/train.jsonl --tokenizer gpt2
    """

    data: str = flag("", "jsonl with prompts and right answers: a response ends where its answer does; none: lengths are drawn", path=True)
    tokenizer: str = flag("", "folder of the tokenizer for --data", path=True)
    max_length: int = flag(512, "tokens of prompt and response together; the baseline pads to it", range=POSITIVE)
    max_prompt_length: int = flag(256, "tokens of a prompt; the baseline pads to it", range=POSITIVE)
    micro_batch_size: Annotated[int, alias("--mbs")] = flag(8, "rows of one forward pass on one rank", range=POSITIVE)
    global_batch_size: Annotated[int, alias("--gbs")] = flag(32, "rows of one iteration", range=POSITIVE)
    rollout_batch_size: int = flag(64, "rows decoded together on one replica", range=POSITIVE)
    parallel: Group[ParallelConfig] = ParallelConfig()
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "weights and activations; auto: bf16 on a GPU, fp32 on a CPU")
    lr: float = flag(5e-5, "of student and soft prompt", range=POSITIVE)
    baseline: Literal["none", "hf"] = flag("none", "hf: the same iteration as the reference does it, in turn with ours")
    measure: tuple[Literal["iteration", "generation", "memory", "generation_parts"], ...] = flag(
        ("iteration", "generation", "memory"), "what to measure; generation_parts: where generation's time goes, a table alone"
    )
    repetitions: int = flag(5, "iterations measured, each on its own global batch; medians are shown", range=POSITIVE)
    threads: int | None = flag(None, "CPU threads of a rank; default: torch's", range=POSITIVE)
    out: str = flag("", "where CSV and figure go, no suffix; default: benchmarks/results/iteration_<cpu or gpu>", path=True)
    seed: int = flag(1234, "of rows and sampling", range=SEED)

    @property
    def max_new_tokens(self) -> int:
        """What --max-prompt-length leaves of --max-length."""
        return self.max_length - self.max_prompt_length

    def validation_errors(self):
        if bool(self.data) != bool(self.tokenizer):
            yield "--data and --tokenizer go together; give both or none"
        if self.max_prompt_length >= self.max_length:
            yield f"--max-prompt-length {self.max_prompt_length} leaves no room for a response in --max-length {self.max_length}; lower it"
        if self.baseline == "hf" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            yield "--baseline hf runs in one process; leave out torchrun, or the baseline"
        yield from super().validation_errors()


@dataclass(frozen=True, kw_only=True)
class SystemsConfig(SizesConfig):
    """On-policy distillation by KL(q‖p): the same iteration in megakd's layouts and in what people use today, in turn, each in processes
    of its own.

    python scripts/benchmark_systems.py --data dolly/train.jsonl --tokenizer gpt2 --threads 2
    """

    data: str = flag("", "jsonl with prompts; the first that fit are answered", path=True)
    tokenizer: str = flag("", "folder of the tokenizer for --data", path=True)
    systems: tuple[Literal[SYSTEMS], ...] = flag(
        SYSTEMS,
        "what to measure: the first is what ratios are taken to; trl and liger need `pip install trl liger-kernel`",
    )
    curves: tuple[Literal["rows", "length", "vocabulary", "ranks"], ...] = flag(
        (), "also how cost grows with these, for megakd and trl (ranks: megakd's layouts)"
    )
    max_prompt_length: int = flag(192, "tokens of a prompt; `transformers` pads to it", range=POSITIVE)
    max_new_tokens: int = flag(64, "tokens of every response", range=POSITIVE)
    micro_batch_size: Annotated[int, alias("--mbs")] = flag(4, "rows of one forward pass on one rank", range=POSITIVE)
    global_batch_size: Annotated[int, alias("--gbs")] = flag(8, "rows of one iteration", range=POSITIVE)
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "weights and activations; auto: bf16 on a GPU, fp32 on a CPU")
    lr: float = flag(5e-5, "of the student", range=POSITIVE)
    repetitions: int = flag(5, "iterations measured, after two that are compared; medians are shown", range=POSITIVE)
    threads: int = flag(2, "CPU threads of a system, shared out among its ranks", range=POSITIVE)
    out: str = flag("", "where CSV and figures go, no suffix; default: benchmarks/results/systems_<cpu or gpu>", path=True)
    seed: int = flag(1234, "of sampling", range=SEED)

    def validation_errors(self):
        yield from super().validation_errors()
        if not (self.data and self.tokenizer):
            yield "--data and --tokenizer are missing; name a jsonl with prompts, and the folder of a tokenizer"
        for name, (_, hidden) in self.sizes.items():
            if "megakd-tp2" in self.systems and hidden // 64 % 2:
                yield f"--systems megakd-tp2: {name}'s {max(1, hidden // 64)} heads do not go into two; choose another --{name}-hidden"
        if self.global_batch_size % (2 * self.micro_batch_size):
            rows = f"--global-batch-size {self.global_batch_size}"
            yield f"{rows} is not a multiple of two micro-batches of {self.micro_batch_size} rows, one a replica; make it one"
