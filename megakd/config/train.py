"""The command that trains: scripts/pretrain_kd.py.

The table of methods stands in `Config`: a line for each, called by its name, whose type is its page in methods/. What a run, a check
or a message depends on in a method is read from that page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from megakd.config.base import BaseConfig
from megakd.config.conditioning import ConditioningConfig
from megakd.config.distillation import DistillationConfig
from megakd.config.fields import POSITIVE, TEMPLATE_HELP, Group, alias, as_words, flag
from megakd.config.lora import LoRAConfig
from megakd.config.methods.base import MethodConfig
from megakd.config.methods.distillm import DistiLLMConfig
from megakd.config.methods.kd import KDConfig
from megakd.config.methods.minillm import MiniLLMConfig
from megakd.config.methods.promptkd import PromptKDConfig
from megakd.config.methods.response_priming import ResponsePrimingConfig
from megakd.config.methods.seqkd import SeqKDConfig
from megakd.config.methods.sft import SFTConfig
from megakd.config.models import SELF, ModelConfig
from megakd.config.output import OutputConfig
from megakd.config.parallel import ParallelConfig, TeacherParallelConfig
from megakd.config.preview import PreviewConfig
from megakd.config.running import RunningConfig
from megakd.config.sampling import GenerationConfig
from megakd.config.scores import ScoreConfig, SelectionConfig
from megakd.config.teacher import TeacherConfig
from megakd.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """jsonl, txt, a dataset folder, parquet, or .bin with .idx: prompts with responses, instructions, chats, text."""

    train_data: Annotated[str, alias("--train-data-path", "--data-path")] = flag("", "what to learn from, see docs/data.md", path=True)
    valid_data: Annotated[str, alias("--valid-data-path")] = flag("", "held-out data, in any form; none: no evaluation", path=True)
    prompt_template: str = flag("alpaca", TEMPLATE_HELP, path=True)
    max_length: Annotated[int, alias("--seq-length")] = flag(
        512, "tokens of prompt and response together; longer responses are cut", range=POSITIVE
    )
    max_prompt_length: int = flag(256, "tokens of a prompt; rows with a longer one are left out", range=POSITIVE)


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Distil a student from a teacher: on-policy, exactly, with tensor, pipeline and data parallelism.

    torchrun --nproc_per_node 2 scripts/pretrain_kd.py --method promptkd --model STUDENT --teacher-model TEACHER
    --train-data train.jsonl --valid-data valid.jsonl --tensor-model-parallel-size 2 --train-iters 1000 --save runs/promptkd
    """

    method: MethodName = "promptkd"
    models: Group[ModelConfig] = ModelConfig()
    data: Group[DataConfig] = DataConfig()
    teacher: Group[TeacherConfig] = TeacherConfig()
    conditioning: Group[ConditioningConfig] = ConditioningConfig()
    parallel: Group[ParallelConfig] = ParallelConfig()
    teacher_parallel: Group[TeacherParallelConfig] = TeacherParallelConfig()
    training: Group[TrainingConfig] = TrainingConfig()
    lora: Group[LoRAConfig] = LoRAConfig()
    distillation: Group[DistillationConfig] = DistillationConfig()
    sft: Group[SFTConfig] = SFTConfig()
    kd: Group[KDConfig] = KDConfig()
    seqkd: Group[SeqKDConfig] = SeqKDConfig()
    distillm: Group[DistiLLMConfig] = DistiLLMConfig()
    minillm: Group[MiniLLMConfig] = MiniLLMConfig()
    promptkd: Group[PromptKDConfig] = PromptKDConfig()
    response_priming: Group[ResponsePrimingConfig] = ResponsePrimingConfig()
    generation: Group[GenerationConfig] = GenerationConfig()
    output: Group[OutputConfig] = OutputConfig()
    preview: Group[PreviewConfig] = PreviewConfig()
    selection: Group[SelectionConfig] = SelectionConfig()
    scores: Group[ScoreConfig] = ScoreConfig()
    running: Group[RunningConfig] = RunningConfig()

    @property
    def page(self) -> MethodConfig:
        """The method's own page, with its flags."""
        return getattr(self, self.method)

    @property
    def needs_teacher(self) -> bool:
        """Whether the method learns from one."""
        return self.page.needs_teacher

    @property
    def teacher_shares_weights(self) -> bool:
        """Whether the teacher is the student with its adapters off, and has no weights of its own."""
        teacher, layout = self.teacher, self.teacher_parallel
        elsewhere = layout.flags_given(self.parallel) or layout.teacher_offload or teacher.teacher_cache
        is_another = teacher.teacher_quantize != "none" or self.training.reference_compat.teacher_dropout
        return bool(self.needs_teacher and self.lora.rank and self.models.teacher_model == SELF and not (elsewhere or is_another))

    @property
    def max_new_tokens(self) -> int:
        """--max-new-tokens, by default what --max-prompt-length leaves of --max-length."""
        return self.generation.max_new_tokens or self.data.max_length - self.data.max_prompt_length

    @property
    def writes_with_vllm(self) -> bool:
        """Whether vLLM writes responses in the student's place, be it now and then."""
        return self.generation.rollout_engine == "vllm" and self.page.learns_own_text(self)

    def validation_errors(self):
        yield from self._missing()
        yield from self._contradictions()
        yield from self.models.validation_errors(self)
        yield from self.conditioning.validation_errors()
        yield from self.teacher.validation_errors(self)
        yield from self.lora.validation_errors()
        yield from self.distillation.validation_errors(self)
        yield from self.teacher_parallel.validation_errors(self)
        yield from self.selection.validation_errors(self)
        yield from self.scores.validation_errors()
        yield from self.generation.validation_errors(self)
        yield from self.running.validation_errors()
        yield from self.page.validation_errors(self)

    def _missing(self) -> Iterator[str]:
        if not self.models.model:
            yield "--model is missing; give the student's Hugging Face folder or native checkpoint"
        if self.needs_teacher and not (self.models.teacher_model or self.teacher.teacher_cache):
            yield f"--method {self.method} needs --teacher-model; give the teacher's folder"
        yield from self.unread()
        if not self.data.train_data:
            yield "--train-data is missing; give a jsonl file with prompt and response"
        if not self.output.save:
            yield "--save is missing; name the folder that the run shall fill"

    def _contradictions(self) -> Iterator[str]:
        data, training, parallel = self.data, self.training, self.parallel
        if (training.train_iters is None) == (training.epochs is None):
            yield f"--train-iters {training.train_iters} and --epochs {training.epochs}: give exactly one of them"
        if parallel.sequence_parallel and max(parallel.tensor_model_parallel_size, self.teacher_parallel.sizes(parallel)[0]) == 1:
            yield "--sequence-parallel needs --tensor-model-parallel-size of at least 2; leave it out"
        if parallel.use_distributed_optimizer and training.optimizer == "sgd":
            yield "--use-distributed-optimizer splits AdamW's moments, which --optimizer sgd does not have; leave it out"
        if training.gradient_accumulation_fusion and self.lora.rank:
            yield "--gradient-accumulation-fusion is of whole weights' gradients, and with adapters these are frozen; leave it out"
        if training.global_batch_size % self.generation.num_generations:
            yield (
                f"--num-generations {self.generation.num_generations} does not divide --global-batch-size {training.global_batch_size}, "
                "which counts answers; use a divisor of it"
            )
        if data.max_prompt_length >= data.max_length:
            yield f"--max-prompt-length {data.max_prompt_length} leaves no room for a response in --max-length {data.max_length}; lower it"
        if training.min_lr > training.lr:
            yield f"--min-lr {training.min_lr} is above --lr {training.lr}; lower it"
        if self.generation.temperature == 0:
            yield f"--temperature 0: --method {self.method} samples its responses and has no greedy ones; give a number above 0"

    def readers(self) -> dict[str, tuple[str, ...]]:
        """The methods that read each flag: those whose pages say so, and all where no page knows it."""
        return {line.name: methods_reading(line) for line in self.flags()}

    def unread(self) -> Iterator[str]:
        """Flags that this method never reads, given another value than their default."""
        given, usual = self.flat(), type(self)().flat()
        for name, methods in self.readers().items():
            if self.method not in methods and given[name] != usual[name]:
                words = " ".join(as_words(name, given[name]))
                yield f"--method {self.method} has no use for {words}, a flag of {', '.join(methods)}; leave it out"

    def remarks(self) -> Iterator[str]:
        yield from super().remarks()
        yield from self.page.remarks()

    def unless(self) -> dict[str, tuple[Any, str]]:
        held_out, training = (self.data.valid_data, "without --valid-data"), self.training
        adam = (training.optimizer == "adamw" or self.page.soft_prompt_len, "with --optimizer sgd")
        return {
            "momentum": (training.optimizer == "sgd", "without --optimizer sgd"),
            **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_eps"), adam),
            "min_lr": (training.lr_decay_style != "constant", "with --lr-decay-style constant"),
            **dict.fromkeys(("eval_interval", "eval_iters"), held_out),
            "wandb_name": (self.output.wandb_project, "without --wandb-project"),
            "vllm_gpu_memory_utilization": (self.generation.rollout_engine == "vllm", "without --rollout-engine vllm"),
            "ranks": (self.preview.dry_run, "without --dry-run"),
            **self.distillation.unless(),
            **self.selection.unless(self),
            **self.page.unless(self),
        }


METHODS: dict[str, MethodConfig] = {
    line.name: line.default for line in dataclasses.fields(Config) if isinstance(line.default, MethodConfig)
}  # the pages by name, in the order of the table
METHOD_HELP = "; ".join(f"{name}: {page.help}" for name, page in METHODS.items())
MethodName = Annotated[Literal[tuple(METHODS)], tyro.conf.arg(help=METHOD_HELP)]


def methods_reading(flag: dataclasses.Field) -> tuple[str, ...]:
    """The methods that read a flag, in the order of the table."""
    return tuple(name for name, page in METHODS.items() if page.reads(flag)) or tuple(METHODS)
