"""Every setting of a run: one field is one flag, with its help and its check. A YAML file lies under the flags; flags win.

Flag names are Megatron's where Megatron has one, then Hugging Face's, then PromptKD's own. Importing this file imports no torch,
so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tyro
import yaml

from megakd.errors import UserError, fail, file_errors, tell

MethodName = Literal["sft", "kd", "seqkd", "distillm", "minillm", "promptkd"]
Objective = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
METHOD_HELP = (
    "sft: cross-entropy on the responses; kd: a divergence on the responses; seqkd: the teacher's own responses; "
    "distillm: kd with the student's own text as it begins to help; minillm: policy gradient on the student's responses; "
    "promptkd: KL to a prompted teacher on the student's responses"
)
TEMPLATE_HELP = "how an instruction becomes a prompt: alpaca (MiniLLM's), plain, or the path of a .jinja file"
Quirk = Literal[
    "all", "mean-of-means", "zero-lr-start", "lost-last-step", "decay-norms", "teacher-dropout", "special-tokens-in-prompt", "forced-eos",
    "whiten-padding", "seqkd-with-kd",
]  # fmt: skip
METHODS: tuple[MethodName, ...] = get_args(MethodName)
TEACHER_METHODS = ("kd", "seqkd", "distillm", "minillm", "promptkd")
ROLLOUT_METHODS = TEACHER_METHODS  # each of them writes responses, be it now and then
DIVERGENCE_METHODS = ("kd", "seqkd", "distillm")


def flag(default: Any, help: str, *, methods: tuple[MethodName, ...] = ()) -> Any:
    """A field that is a flag with this help; `methods` alone read it, or where none is named those of its group."""
    return field(default=default, metadata={"help": help, "methods": methods})


def alias(*names: str) -> Any:
    """Other spellings of a flag: Hugging Face's, MiniLLM's, short ones."""
    return tyro.conf.arg(aliases=names)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Student and teacher: Hugging Face folders or native checkpoints."""

    model: Annotated[str, alias("--model-name-or-path", "--model-path")] = flag("", "the student's folder")
    teacher_model: Annotated[str, alias("--teacher-model-name-or-path", "--teacher-model-path")] = flag(
        "", "the teacher's folder", methods=TEACHER_METHODS
    )
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "bf16 has fp32 master weights; auto: bf16 on a GPU, else fp32")
    hidden_dropout: float | None = flag(None, "the student's dropout while it learns; default: what its config.json says, 0 with minillm")
    attention_dropout: float | None = flag(None, "the student's attention dropout; default: what its config.json says, 0 with minillm")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """jsonl, txt, a dataset folder, parquet, or .bin with .idx: prompts with responses, instructions, chats, text."""

    train_data: Annotated[str, alias("--train-data-path", "--data-path")] = flag("", "what to learn from, see docs/data.md")
    valid_data: Annotated[str, alias("--valid-data-path")] = flag("", "held-out data, in any form; none: no evaluation")
    prompt_template: str = flag("alpaca", TEMPLATE_HELP)
    max_length: Annotated[int, alias("--seq-length")] = flag(512, "tokens of prompt and response together; longer responses are cut")
    max_prompt_length: int = flag(256, "tokens of a prompt; rows with a longer one are left out")


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How a model is spread over ranks; what TP × PP leaves is data parallelism."""

    tensor_model_parallel_size: Annotated[int, alias("--tp")] = flag(1, "ranks that share one layer")
    pipeline_model_parallel_size: Annotated[int, alias("--pp")] = flag(1, "ranks that follow each other, each with some of the layers")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(LayoutConfig):
    """The layout of a run, and what else Megatron splits over its ranks."""

    sequence_parallel: bool = flag(False, "split what is between tensor-parallel layers along the sequence too")
    use_distributed_optimizer: bool = flag(False, "split the optimizer's state over data-parallel ranks (ZeRO-1)")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batch, length of the run, optimizer."""

    def quirk(self, name: Quirk) -> bool:
        """Whether the reference's behaviour of this name was asked for."""
        return name in self.reference_behaviour or "all" in self.reference_behaviour

    micro_batch_size: Annotated[int, alias("--mbs")] = flag(2, "rows of one forward pass on one rank")
    micro_batch_tokens: int | None = flag(None, "positions of one forward pass on one rank, a further limit beside --micro-batch-size")
    global_batch_size: Annotated[int, alias("--gbs")] = flag(32, "rows of one optimizer step over all ranks")
    train_iters: Annotated[int | None, alias("--max-steps")] = flag(None, "optimizer steps; or give --epochs")
    epochs: Annotated[int | None, alias("--num-train-epochs")] = flag(None, "passes over the training data; or give --train-iters")
    lr: Annotated[float, alias("--learning-rate")] = flag(5e-5, "the student's highest learning rate")
    min_lr: float = flag(0.0, "where the decay ends")
    lr_warmup_iters: Annotated[int, alias("--warmup-iters")] = flag(0, "iterations of linear warm-up")
    lr_decay_style: Literal["constant", "linear", "cosine"] = flag("cosine", "how the learning rate falls after the warm-up")
    weight_decay: float = flag(0.01, "AdamW's weight decay; norms and biases have none")
    adam_beta1: float = flag(0.9, "AdamW's first moment")
    adam_beta2: float = flag(0.999, "AdamW's second moment")
    adam_eps: float = flag(1e-8, "AdamW's epsilon")
    clip_grad: float = flag(1.0, "largest global gradient norm; 0: no clipping")
    recompute: bool = flag(False, "recompute each layer's activations in the backward pass: less memory, a third more work")
    reference_behaviour: tuple[Quirk, ...] = flag((), "do as PromptKD's code does, by name or all; docs/fidelity.md explains each")
    seed: int = flag(1234, "of data order, dropout, prompt and sampling; of these the layout changes dropout's masks alone")


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What the student learns from the teacher."""

    kd_ratio: Annotated[float | None, alias("--kd-alpha")] = flag(
        None,
        "share of the divergence, the rest is cross-entropy; default: 0.5 (kd, minillm's text), 0 (seqkd), 1 (distillm)",
        methods=(*DIVERGENCE_METHODS, "minillm"),
    )
    kd_objective: Objective = flag("forward_kl", "which divergence between teacher p and student q", methods=DIVERGENCE_METHODS)
    kd_temperature: float = flag(
        1.0, "temperature of both distributions in the divergence, never of sampling", methods=DIVERGENCE_METHODS
    )
    beta: float = flag(0.5, "jsd: the teacher's share of the mixture", methods=DIVERGENCE_METHODS)
    skew_alpha: float = flag(
        0.1, "skew_*: share of the first distribution in the mixture (DistiLLM)", methods=DIVERGENCE_METHODS
    )
    on_policy_ratio: Annotated[float, alias("--lmbda")] = flag(
        0.0, "kd: share of the batches that the student writes (GKD's lambda)", methods=("kd",)
    )
    hidden_coef: float = flag(0.0, "weight of matching hidden states beside distributions; 0: none", methods=DIVERGENCE_METHODS)
    hidden_loss: Literal["mse", "cosine"] = flag("mse", "the distance of two hidden states", methods=DIVERGENCE_METHODS)
    hidden_layers: tuple[int, ...] = flag(
        (),
        "layers of the student to match, counted from 1, each with the teacher's at the same height; default: the last",
        methods=DIVERGENCE_METHODS,
    )
    replay_capacity: int = flag(
        1000, "distillm: responses of the student that are kept to be learnt from again", methods=("distillm",)
    )

    def ratio(self, usual: float) -> float:
        """--kd-ratio, or a method's usual one where it is not given."""
        return usual if self.kd_ratio is None else self.kd_ratio


@dataclass(frozen=True, kw_only=True)
class PromptKDConfig:
    """PromptKD's soft prompt (arXiv 2402.12842)."""

    prompt_len: int = flag(7, "soft prompt vectors in front of the teacher")
    prompt_init: Literal["text", "random"] = flag("text", "start from the embeddings of --prompt-init-text, or from random vectors")
    prompt_init_text: str = flag("Suppose you are a student.", "repeated or cut to --prompt-len tokens")
    teacher_lr: float | None = flag(None, "the soft prompt's highest learning rate; default: --lr")
    teacher_kld_type: Literal["reverse", "forward"] = flag("reverse", "reverse: KL(prompted teacher‖student), forward: the other way round")
    base_kld_type: Literal["reverse", "forward"] = flag("reverse", "the same for the base teacher in the student's place")
    base_coef: float = flag(1.0, "weight of KL(prompted‖base teacher) at the start; it falls linearly to 0")


@dataclass(frozen=True, kw_only=True)
class MiniLLMConfig:
    """MiniLLM's policy gradient (arXiv 2306.08543)."""

    num_rollouts: int = flag(256, "responses of one phase, over all ranks; a multiple of --global-batch-size")
    ppo_epochs: int = flag(4, "passes over a phase's responses")
    teacher_mixed_alpha: float = flag(0.2, "share of the teacher in the distribution that responses are drawn from")
    gamma: float = flag(0.95, "discount of later rewards")
    reward_scaling: float = flag(0.5, "log p − log q is divided by it")
    cliprange_reward: float = flag(100.0, "largest reward of a token, either sign")
    cliprange: float = flag(0.2, "ε of the clipped objective")
    length_norm: bool = flag(True, "divide a return by the tokens that are left")
    single_step_reg: bool = flag(True, "add the exact KL(q‖p) of every step")
    lm_coef: float = flag(1.0, "weight of the loss on text; 0: none")
    lm_data: str = flag("", "text for it, in any form; default: --train-data")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = flag(1.0, "of sampling alone, never of a loss", methods=ROLLOUT_METHODS)
    top_k: int = flag(0, "sample among the k likeliest tokens; 0: all", methods=ROLLOUT_METHODS)
    top_p: float = flag(1.0, "sample among the likeliest tokens that hold this probability; 1: all", methods=ROLLOUT_METHODS)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplingConfig):
    """How the student writes its responses (on-policy methods)."""

    max_new_tokens: int | None = flag(None, "longest response; default: --max-length minus --max-prompt-length")
    rollout_batch_size: int = flag(64, "rows decoded together", methods=ROLLOUT_METHODS)


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What a run leaves in --save."""

    save: Annotated[str, alias("--output-dir")] = flag("", "folder of the run: config, metrics, checkpoints, Hugging Face export, figures")
    save_interval: Annotated[int | None, alias("--save-steps")] = flag(None, "iterations between checkpoints; default: only the last")
    eval_interval: Annotated[int | None, alias("--eval-steps")] = flag(
        None, "iterations between evaluations; default: before and after, distillm: every epoch, ten a run at least"
    )
    eval_iters: int | None = flag(None, "global batches of an evaluation; default: all of --valid-data")
    log_interval: Annotated[int, alias("--logging-steps")] = flag(1, "iterations between progress lines")
    save_rollouts: bool = flag(
        False, "write rollouts.jsonl: ids and loss mask of every response, so that any step can be recomputed", methods=ROLLOUT_METHODS
    )


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What the configurations of all commands share."""

    def check(self) -> None:
        """Refuse what cannot be, before anything is loaded.

        Raises:
            UserError: the first impossible value or combination, with its flag.
        """
        for complaint in chain(out_of_range(self), self.complaints()):  # the first alone: a 0 would be divided by in the second
            raise UserError(complaint)

    def complaints(self) -> Iterator[str]:
        """What is wrong, one line each; ranges of numbers are looked at elsewhere."""
        yield from ()

    def unless(self) -> dict[str, tuple[Any, str]]:
        """Flags that are read under a condition: whether it holds, and how a message says that it does not."""
        return {}

    def remarks(self) -> Iterator[str]:
        """Flags given another value than their default, to no effect: allowed, for files of settings are shared, but told."""
        given, usual = self.flat(), type(self)().flat()
        for name, (is_read, how) in self.unless().items():
            if given[name] != usual[name] and not is_read:
                yield f"{' '.join(as_words(name, given[name]))} has no effect {how}"

    def flat(self) -> dict[str, Any]:
        """All settings by flag name, as in config.yaml."""
        return flatten(dataclasses.asdict(self))


AnyConfig = TypeVar("AnyConfig", bound=BaseConfig)


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Distil a student from a teacher: on-policy, exactly, with tensor, pipeline and data parallelism.

    torchrun --nproc_per_node 2 scripts/pretrain_kd.py --method promptkd --model STUDENT --teacher-model TEACHER
    --train-data train.jsonl --valid-data valid.jsonl --tensor-model-parallel-size 2 --train-iters 1000 --save runs/promptkd
    """

    method: MethodName = flag("promptkd", METHOD_HELP)
    models: tyro.conf.OmitArgPrefixes[ModelConfig] = field(default_factory=ModelConfig)
    data: tyro.conf.OmitArgPrefixes[DataConfig] = field(default_factory=DataConfig)
    parallel: tyro.conf.OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)
    training: tyro.conf.OmitArgPrefixes[TrainingConfig] = field(default_factory=TrainingConfig)
    distillation: tyro.conf.OmitArgPrefixes[DistillationConfig] = field(default_factory=DistillationConfig)
    promptkd: tyro.conf.OmitArgPrefixes[PromptKDConfig] = field(default_factory=PromptKDConfig)
    minillm: tyro.conf.OmitArgPrefixes[MiniLLMConfig] = field(default_factory=MiniLLMConfig)
    generation: tyro.conf.OmitArgPrefixes[GenerationConfig] = field(default_factory=GenerationConfig)
    output: tyro.conf.OmitArgPrefixes[OutputConfig] = field(default_factory=OutputConfig)

    @property
    def needs_teacher(self) -> bool:
        """Whether the method learns from one; --teacher-model is refused where it does not."""
        return self.method in TEACHER_METHODS

    @property
    def max_new_tokens(self) -> int:
        """--max-new-tokens, by default what --max-prompt-length leaves of --max-length."""
        return self.generation.max_new_tokens or self.data.max_length - self.data.max_prompt_length

    def readers(self) -> dict[str, tuple[MethodName, ...]]:
        """The methods that read each flag: those of its own line, else the one its group is called after, else all."""
        return {
            line.name: line.metadata["methods"] or ((group.name,) if group.name in METHODS else METHODS)
            for group in dataclasses.fields(self)
            if dataclasses.is_dataclass(group.default_factory)
            for line in dataclasses.fields(group.default_factory)
        }

    def unread(self) -> Iterator[str]:
        """Flags that this method never reads, given another value than their default."""
        given, usual = self.flat(), Config().flat()
        for name, methods in self.readers().items():
            if self.method not in methods and given[name] != usual[name]:
                words = " ".join(as_words(name, given[name]))
                yield f"--method {self.method} has no use for {words}, a flag of {', '.join(methods)}; leave it out"

    def complaints(self):
        models, data, training, parallel = self.models, self.data, self.training, self.parallel
        if not models.model:
            yield "--model is missing; give the student's Hugging Face folder or native checkpoint"
        if self.needs_teacher and not models.teacher_model:
            yield f"--method {self.method} needs --teacher-model; give the teacher's folder"
        yield from self.unread()
        if not data.train_data:
            yield "--train-data is missing; give a jsonl file with prompt and response"
        if not self.output.save:
            yield "--save is missing; name the folder that the run shall fill"
        if (training.train_iters is None) == (training.epochs is None):
            yield f"--train-iters {training.train_iters} and --epochs {training.epochs}: give exactly one of them"
        if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
            yield "--sequence-parallel needs --tensor-model-parallel-size of at least 2; leave it out"
        if data.max_prompt_length >= data.max_length:
            yield f"--max-prompt-length {data.max_prompt_length} leaves no room for a response in --max-length {data.max_length}; lower it"
        if self.method == "minillm" and self.minillm.num_rollouts % training.global_batch_size:
            rows = training.global_batch_size
            yield f"--num-rollouts {self.minillm.num_rollouts} is not a multiple of --global-batch-size {rows}; make it one"
        if self.method == "distillm" and not data.valid_data:
            yield "--method distillm needs --valid-data; it watches the held-out loss"
        phase = self.minillm.num_rollouts // training.global_batch_size * self.minillm.ppo_epochs
        if self.method == "minillm" and self.output.save_interval and self.output.save_interval % max(1, phase):
            every = self.output.save_interval
            yield f"--save-interval {every} is no multiple of MiniLLM's phase of {phase} iterations, which is not saved; make it one"
        distillation = self.distillation
        share = {"jsd": "beta", "skew_forward_kl": "skew_alpha", "skew_reverse_kl": "skew_alpha"}.get(distillation.kd_objective)
        if share and getattr(distillation, share) in (0, 1):
            value, objective = getattr(distillation, share), distillation.kd_objective
            yield f"{flag_name(share)} {value} leaves {objective} no mixture; use a number between 0 and 1"
        if distillation.hidden_coef and training.recompute:
            yield "--hidden-coef with --recompute: a layer that runs twice would be matched twice; leave one of them out"
        if distillation.hidden_coef and training.quirk("mean-of-means"):
            yield "--hidden-coef is a token mean, which --reference-behaviour mean-of-means is not; leave one of them out"
        for name in ("hidden_dropout", "attention_dropout"):
            if self.method == "minillm" and getattr(models, name):
                yield f"{flag_name(name)} {getattr(models, name)}: MiniLLM's student learns without dropout, as it wrote; leave it out"
        if self.method == "minillm" and self.minillm.teacher_mixed_alpha == 1:
            yield "--teacher-mixed-alpha 1 leaves the student no say in its responses; use a number below 1"
        if training.min_lr > training.lr:
            yield f"--min-lr {training.min_lr} is above --lr {training.lr}; lower it"
        if self.generation.temperature == 0:
            yield f"--temperature 0: --method {self.method} samples its responses and has no greedy ones; give a number above 0"

    def unless(self):
        distillation, schedule = self.distillation, self.training.lr_decay_style
        objective, held_out = distillation.kd_objective, (self.data.valid_data, "without --valid-data")
        writes = (self.method != "kd" or distillation.on_policy_ratio, "with --method kd unless --on-policy-ratio is above 0")
        rollouts = ("temperature", "top_k", "top_p", "rollout_batch_size", "save_rollouts")
        return {
            "beta": (objective == "jsd", "without --kd-objective jsd"),
            "skew_alpha": (objective.startswith("skew"), "without --kd-objective skew_forward_kl or skew_reverse_kl"),
            "prompt_init_text": (self.promptkd.prompt_init == "text", "with --prompt-init random"),
            "lm_data": (self.minillm.lm_coef, "with --lm-coef 0"),
            "min_lr": (schedule != "constant", "with --lr-decay-style constant"),
            **dict.fromkeys(("eval_interval", "eval_iters"), held_out),
            **dict.fromkeys(rollouts, writes),
            **dict.fromkeys(("hidden_loss", "hidden_layers"), (distillation.hidden_coef, "without --hidden-coef")),
        }


@dataclass(frozen=True, kw_only=True)
class ResponseConfig(SamplingConfig):
    """How prompts are answered."""

    prompt_template: str = flag("alpaca", TEMPLATE_HELP)
    max_prompt_length: int = flag(256, "tokens of a prompt; rows with a longer one are left out")
    max_new_tokens: int = flag(256, "longest response")
    greedy: bool = flag(False, "the likeliest token each time, nothing random")
    repetition_penalty: float = flag(1.0, "divides the logits of tokens that the row holds (multiplies negative ones); 1: off")
    no_repeat_ngram_size: int = flag(0, "no token that completes a run of so many tokens a second time; 0: no limit")
    batch_size: int = flag(64, "rows answered together on one replica")


@dataclass(frozen=True, kw_only=True)
class AnsweringConfig(BaseConfig):
    """What the commands share that let a model answer prompts."""

    model: Annotated[str, alias("--model-name-or-path", "--model-path")] = flag("", "folder or native checkpoint that answers")
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "weights and activations; auto: bf16 on a GPU, fp32 on a CPU")
    responses: tyro.conf.OmitArgPrefixes[ResponseConfig] = field(default_factory=ResponseConfig)
    parallel: tyro.conf.OmitArgPrefixes[LayoutConfig] = field(default_factory=LayoutConfig)

    def complaints(self):
        if not self.model:
            yield "--model is missing; give a Hugging Face folder or a native checkpoint"
        if self.responses.temperature == 0:
            yield "--temperature 0 leaves nothing to sample from; give --greedy in its place, the likeliest token each time"

    def unless(self):
        return dict.fromkeys(("temperature", "top_k", "top_p"), (not self.responses.greedy, "beside --greedy"))


ROUGE_TOKENIZERS = ("default", "unicode", "model")


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """By which rules answers are scored."""

    exact_match_rule: Literal["strict", "papers"] = flag(
        "strict", "strict: equal but for case, spacing and a last full stop; papers: without any punctuation, 3.5 is 35"
    )
    gsm8k_rule: Literal["robust", "papers"] = flag(
        "robust", "robust: the number stated last, else the last number; papers: strict and flexible of Goyal et al. 2024"
    )
    rouge_tokenizer: tuple[str, ...] = flag(
        ("default",), "of Rouge-L: default (the papers', a-z and digits alone), unicode (words of every script) or model; also set=unicode"
    )

    def rouge_tokenizer_of(self, name: str) -> str:
        """The one named for a data set, or for all."""
        return self.rouge_tokenizers.get(name, self.rouge_tokenizers.get("", "default"))

    @property
    def rouge_tokenizers(self) -> dict[str, str]:
        """By data set; under "" the one of all others."""
        return {name: kind for name, _, kind in (word.rpartition("=") for word in self.rouge_tokenizer)}

    def complaints(self) -> Iterator[str]:
        """What is no tokenizer."""
        for word, kind in zip(self.rouge_tokenizer, self.rouge_tokenizers.values()):
            if kind not in ROUGE_TOKENIZERS:
                yield f"--rouge-tokenizer {word}: use one of {', '.join(ROUGE_TOKENIZERS)}, for one data set as in name=unicode"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AnsweringConfig):
    """Scores of a model on data sets: Rouge-L, exact match, LM loss, and beside a teacher held-out KL and exposure bias.

    torchrun --nproc_per_node 2 scripts/evaluate.py --model MODEL --teacher-model TEACHER --data dolly=dolly/valid.jsonl
    vicuna=vicuna/valid.jsonl --seeds 10 20 30 40 50 --save evaluation/model
    """

    teacher_model: Annotated[str, alias("--teacher-model-name-or-path", "--teacher-model-path")] = flag("", "to compare with")
    data: tuple[str, ...] = flag((), "jsonl files with right answers, each as name=path or path")
    gsm8k: str = flag("", "GSM8K jsonl (question, answer with ####): accuracy of the number")
    seeds: tuple[int, ...] = flag((10, 20, 30, 40, 50), "one pass over the data each; scores are their mean")
    exposure_bias: bool = flag(False, "R(l), lε(l) and ExAccErr(l) between the model and --teacher-model")
    exposure_bias_samples: int = flag(1, "responses per prompt of each model, with the first of --seeds")
    exposure_bias_skip_first: bool = flag(False, "leave out the first token of a response, as MiniLLM's code does")
    add_bos: bool = flag(False, "put the tokenizer's beginning-of-text before prompts, as MiniLLM's evaluation does")
    micro_batch_size: Annotated[int, alias("--mbs")] = flag(8, "rows of one forward pass on one rank, for losses and KL")
    scores: tyro.conf.OmitArgPrefixes[ScoreConfig] = field(default_factory=ScoreConfig)
    save: Annotated[str, alias("--output-dir")] = flag("", "folder for results.json, answers.jsonl and figures; none: only print")
    overwrite: bool = flag(False, "replace the results that --save holds")

    def complaints(self):
        yield from super().complaints()
        if not (self.data or self.gsm8k):
            yield "--data is missing; give jsonl files with prompt and response, or --gsm8k"
        yield from self.scores.complaints()
        if not self.seeds:
            yield "--seeds is empty; give one number or more"
        if twice := [seed for i, seed in enumerate(self.seeds) if seed in self.seeds[:i]]:
            yield f"--seeds names {twice[0]} more than once, and the same answers would count as more; name each seed once"
        if self.exposure_bias and not self.teacher_model:
            yield "--exposure-bias needs --teacher-model; give the folder to compare with"
        if self.exposure_bias_samples > len(self.seeds):
            yield f"--exposure-bias-samples {self.exposure_bias_samples} is more than the {len(self.seeds)} --seeds; add seeds"

    def unless(self):
        curves = dict.fromkeys(("exposure_bias_samples", "exposure_bias_skip_first"), (self.exposure_bias, "without --exposure-bias"))
        return super().unless() | curves | {"overwrite": (self.save, "without --save")}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AnsweringConfig):
    """Answers to the prompts of a jsonl file, into a jsonl file that can be trained on as it is. The same command continues it.

    torchrun --nproc_per_node 2 scripts/generate.py --model TEACHER --data train.jsonl --save seqkd.jsonl
    """

    data: str = flag("", "jsonl file with prompt, or with instruction and input")
    save: Annotated[str, alias("--output")] = flag("", "jsonl file to write: the fields of --data, and response")
    seed: int = flag(1234, "of sampling; no result depends on the layout or the batch size")
    token_ids: bool = flag(False, "write prompt_ids and response_ids too")

    def complaints(self):
        yield from super().complaints()
        if not self.data:
            yield "--data is missing; give a jsonl file with prompts"
        if not self.save:
            yield "--save is missing; name the jsonl file to write"


PRESETS = {  # layers and hidden size of student and teacher
    "gpt2-small-cpu": ((6, 384), (12, 512)),
    "gpt2-base": ((12, 768), (24, 1024)),
    "gpt2-xl": ((12, 768), (48, 1600)),
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(BaseConfig):
    """One PromptKD iteration taken apart, of random models, on its own or beside transformers and PEFT in turn.

    python scripts/benchmark.py --preset gpt2-small-cpu --baseline hf --data dolly/train.jsonl --tokenizer gpt2
    """

    preset: Literal["gpt2-small-cpu", "gpt2-base", "gpt2-xl"] = flag(
        "gpt2-small-cpu", "student and teacher of 6×384 and 12×512, 12×768 and 24×1024, 12×768 and 48×1600 (layers × hidden size)"
    )
    student_layers: int | None = flag(None, "instead of the preset's")
    student_hidden: int | None = flag(None, "instead of the preset's; heads are of 64")
    teacher_layers: int | None = flag(None, "instead of the preset's")
    teacher_hidden: int | None = flag(None, "instead of the preset's; heads are of 64")
    vocab_size: int | None = flag(None, "default: the tokenizer's, or GPT-2's 50257")
    data: str = flag("", "jsonl with prompts and right answers: a response ends where its answer does; none: lengths are drawn")
    tokenizer: str = flag("", "folder of the tokenizer for --data")
    max_length: int = flag(512, "tokens of prompt and response together; the baseline pads to it")
    max_prompt_length: int = flag(256, "tokens of a prompt; the baseline pads to it")
    micro_batch_size: Annotated[int, alias("--mbs")] = flag(8, "rows of one forward pass on one rank")
    global_batch_size: Annotated[int, alias("--gbs")] = flag(32, "rows of one iteration")
    parallel: tyro.conf.OmitArgPrefixes[ParallelConfig] = field(default_factory=ParallelConfig)
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "weights and activations; auto: bf16 on a GPU, fp32 on a CPU")
    lr: float = flag(5e-5, "of student and soft prompt")
    baseline: Literal["none", "hf"] = flag("none", "hf: the same iteration as the reference does it, in turn with ours")
    measure: tuple[Literal["iteration", "generation", "memory"], ...] = flag(("iteration", "generation", "memory"), "what to measure")
    repetitions: int = flag(5, "iterations measured, each on its own global batch; medians are shown")
    threads: int | None = flag(None, "CPU threads of a rank; default: torch's")
    out: str = flag("", "where CSV and figure go, no suffix; default: benchmarks/results/iteration_<cpu or gpu>")
    seed: int = flag(1234, "of rows and sampling")

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Layers and hidden size of `student` and `teacher`."""
        student, teacher = PRESETS[self.preset]
        return {
            "student": (self.student_layers or student[0], self.student_hidden or student[1]),
            "teacher": (self.teacher_layers or teacher[0], self.teacher_hidden or teacher[1]),
        }

    @property
    def max_new_tokens(self) -> int:
        """What --max-prompt-length leaves of --max-length."""
        return self.max_length - self.max_prompt_length

    def complaints(self):
        if bool(self.data) != bool(self.tokenizer):
            yield "--data and --tokenizer go together; give both or none"
        if self.max_prompt_length >= self.max_length:
            yield f"--max-prompt-length {self.max_prompt_length} leaves no room for a response in --max-length {self.max_length}; lower it"
        if self.baseline == "hf" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            yield "--baseline hf runs in one process; leave out torchrun, or the baseline"
        for name, (_, hidden) in self.sizes.items():
            if hidden > 64 and hidden % 64:
                yield f"--{name}-hidden {hidden} is not a multiple of 64, the size of a head; make it one"


POSITIVE = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size", "global_batch_size", "train_iters", "epochs",
    "micro_batch_tokens", "max_length", "max_prompt_length", "max_new_tokens", "rollout_batch_size", "prompt_len", "save_interval",
    "eval_interval", "eval_iters", "log_interval", "lr", "batch_size", "exposure_bias_samples", "num_rollouts", "ppo_epochs",
    "replay_capacity", "reward_scaling", "cliprange", "cliprange_reward", "repetition_penalty", "adam_eps", "hidden_layers",
    "student_layers", "student_hidden", "teacher_layers", "teacher_hidden", "vocab_size", "repetitions", "threads",
)  # fmt: skip
NOT_NEGATIVE = (
    "lm_coef", "hidden_coef", "min_lr", "lr_warmup_iters", "weight_decay", "clip_grad", "base_coef", "top_k", "teacher_lr",
    "no_repeat_ngram_size",
)  # fmt: skip
SHARES = ("teacher_mixed_alpha", "gamma", "kd_ratio", "on_policy_ratio", "beta", "skew_alpha")
LARGEST_COUNT, LARGEST_NUMBER = 2**31 - 1, 1e30  # what fits into 32 bits, and with room to spare into a float32
COLDEST = 1e-5  # below it a logit divided by the temperature leaves float32
RANGES = (  # every number stands in one of them; a comparison with NaN is false
    (POSITIVE, lambda x: x > 0, "above 0"),
    (NOT_NEGATIVE, lambda x: x >= 0, "at least 0"),
    (SHARES, lambda x: 0 <= x <= 1, "from 0 to 1"),
    (("top_p",), lambda x: 0 < x <= 1, "above 0 and at most 1"),
    (("kd_temperature",), lambda x: x >= COLDEST, f"at least {COLDEST}"),
    (("temperature",), lambda x: x >= COLDEST or x == 0, f"at least {COLDEST}"),  # 0 has a line of its own among the complaints
    (("adam_beta1", "adam_beta2", "hidden_dropout", "attention_dropout"), lambda x: 0 <= x < 1, "at least 0 and below 1"),
    (("seed", "seeds"), lambda x: 0 <= x < 2**63, "at least 0 and below 2**63"),
)


def out_of_range(config: BaseConfig) -> Iterator[str]:
    """Numbers outside their range; None (not given) is never."""
    values = {name: value for name, value in config.flat().items() if value is not None}
    for names, fits, bounds in RANGES:
        for name in (name for name in names if name in values):
            for value in values[name] if isinstance(values[name], (list, tuple)) else [values[name]]:
                if not fits(value):
                    yield f"{flag_name(name)} {value} must be {bounds}"
                elif (most := largest(name, value)) < value:
                    yield f"{flag_name(name)} {value} must be at most {most}"


def largest(name: str, value: float) -> float:
    """What a number may be whatever its meaning, so that none overflows later."""
    if name in ("seed", "seeds"):
        return math.inf
    return LARGEST_COUNT if isinstance(value, int) else LARGEST_NUMBER


PATHS = (
    "model", "teacher_model", "train_data", "valid_data", "lm_data", "prompt_template", "save", "data", "gsm8k", "tokenizer", "out",
)  # fmt: skip


def with_home(config: AnyConfig) -> AnyConfig:
    """`~` before a path, and before that of `name=path`, is the home folder: no shell has seen a YAML file, nor `--save=~/run`."""
    expand = lambda word: re.sub(r"^([^=/]*=)?(~[^/]*)", lambda found: (found[1] or "") + os.path.expanduser(found[2]), word)
    changes: dict[str, Any] = {}
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            changes[name] = with_home(value)
        elif name in PATHS:
            changes[name] = expand(value) if isinstance(value, str) else tuple(map(expand, value))
    return dataclasses.replace(config, **changes)


def parse(arguments: Sequence[str], kind: type[AnyConfig] = Config, *, program: str = "pretrain_kd.py") -> AnyConfig:
    """Flags over the YAML file of `--config`, over the defaults of `kind`. Exits with one line where they cannot be read."""
    try:
        arguments, file = take_config_file(list(arguments))
        config = from_flags(arguments, from_yaml(file, kind) if file else kind(), program=program)
        config.check()
        for remark in config.remarks():
            tell(remark)
        return config
    except UserError as error:
        fail(str(error))


def take_config_file(arguments: list[str]) -> tuple[list[str], str | None]:
    """`--config FILE` apart from the other flags."""
    rest, file = [], None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
        elif (file := value if equals else next(words, None)) is None:
            raise UserError("--config needs a YAML file")
    return rest, file


def from_yaml(file: str | Path, kind: type[AnyConfig] = Config) -> AnyConfig:
    """A configuration from a flat YAML file of flag names.

    Raises:
        UserError: no such file, not a mapping, or a key that is no flag.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise UserError(f"--config {file}: no such file; check the path")
    with file_errors(file, flag="--config"):
        text = file.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date with 13 months
        raise UserError(f"--config {file}: not YAML ({str(error).splitlines()[0]}); write one `flag-name: value` a line") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {file}: holds a {type(values).__name__}; write one `flag-name: value` a line")
    values = {str(name).lstrip("-").replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(values.keys() - kind().flat().keys()):
        alike = difflib.get_close_matches(unknown[0], kind().flat(), n=1)
        raise UserError(f"--config {file}: unknown key {unknown[0]!r}; {suggestion(*alike or [None])}")
    words = [word for name, value in values.items() if value is not None for word in as_words(name, value)]
    return from_flags(words, kind(), where=f"--config {file}: ")


def as_words(name: str, value: Any) -> list[str]:
    """A YAML entry as the words of a command line, so that it meets the same checks."""
    if isinstance(value, (list, tuple)):
        return [flag_name(name), *map(str, value)]
    if isinstance(value, bool):
        return [flag_name(name if value else f"no_{name}")]
    return [flag_name(name), str(value)]


def description_of(kind: type[BaseConfig]) -> str:
    """What --help says first; `--config` is taken off before the flags are read, and has no line of its own there."""
    config = "--config FILE: a YAML file with any of these flags, `flag-name: value` a line; those given here lie over it."
    return f"{inspect.cleandoc(kind.__doc__)}\n\n{config}"


def from_flags(arguments: list[str], default: AnyConfig, *, where: str = "", program: str | None = None) -> AnyConfig:
    """Flags over `default`. `--help` prints and exits.

    Raises:
        UserError: an unknown flag or a value of the wrong type, in one line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            kind = type(default)
            return with_home(tyro.cli(kind, args=arguments, default=default, prog=program, description=description_of(kind)))
    except SystemExit as exit:
        if not exit.code:
            raise
        raise UserError(where + one_line(said.getvalue())) from None


def one_line(box: str) -> str:
    """tyro's complaint without its frame, with the spellings of the flag that it finds most alike."""
    _title, body, *rest = re.split("─{3,}|-{9,}", re.sub("[│╭╮╰╯]", " ", box))  # where the terminal is ASCII, so is the frame
    alike = re.search(r"(?:similar to \S+|you meant):\s+(--[\w-]+(?:, --[\w-]+)*)", "".join(rest))
    return " ".join(body.split()).rstrip(".") + "; " + suggestion(alike and alike[1])


def suggestion(alike: str | None) -> str:
    """How a message about an unknown name ends."""
    return f"did you mean {alike}? --help lists the flags" if alike else "--help lists the flags"


def flag_name(name: str) -> str:
    """`max_length` -> `--max-length`."""
    return "--" + name.replace("_", "-")


def flatten(nested: dict[str, Any]) -> dict[str, Any]:
    """Groups dissolved: no two flags share a name."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat

