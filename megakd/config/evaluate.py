"""The command that measures: scripts/evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megakd.config.answering import AnsweringConfig
from megakd.config.conditioning import ConditioningConfig
from megakd.config.fields import POSITIVE, SEED, Group, alias, flag
from megakd.config.parallel import TeacherLayoutConfig
from megakd.config.scores import ScoreConfig
from megakd.config.teacher import CACHE_HELP


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AnsweringConfig):
    """Scores of a model on data sets: Rouge-L, exact match, LM loss, and beside a teacher held-out KL and exposure bias.

    torchrun --nproc_per_node 2 scripts/evaluate.py --model MODEL --teacher-model TEACHER --data dolly=dolly/valid.jsonl
    vicuna=vicuna/valid.jsonl --seeds 10 20 30 40 50 --save evaluation/model
    """

    teacher_model: Annotated[str, alias("--teacher-model-name-or-path", "--teacher-model-path")] = flag(
        "", "to compare with; self: the model itself, which with another text says something else", path=True
    )
    teacher_layout: Group[TeacherLayoutConfig] = TeacherLayoutConfig()
    teacher_cache: str = flag("", f"{CACHE_HELP}: --data as its --valid-data was", path=True)
    conditioning: Group[ConditioningConfig] = ConditioningConfig()
    data: tuple[str, ...] = flag((), "jsonl files with right answers, each as name=path or path", path=True)
    gsm8k: str = flag("", "GSM8K jsonl (question, answer with ####): accuracy of the number", path=True)
    seeds: tuple[int, ...] = flag((10, 20, 30, 40, 50), "one pass over the data each; scores are their mean", range=SEED)
    exposure_bias: bool = flag(False, "R(l), lε(l) and ExAccErr(l) between the model and --teacher-model")
    exposure_bias_samples: int = flag(1, "responses per prompt of each model, with the first of --seeds", range=POSITIVE)
    exposure_bias_skip_first: bool = flag(False, "leave out the first token of a response, as MiniLLM's code does")
    add_bos: bool = flag(False, "put the tokenizer's beginning-of-text before prompts, as MiniLLM's evaluation does")
    micro_batch_size: Annotated[int, alias("--mbs")] = flag(
        8, "rows of one forward pass on one rank, for losses and KL", range=POSITIVE
    )
    scores: Group[ScoreConfig] = ScoreConfig()
    save: Annotated[str, alias("--output-dir")] = flag(
        "", "folder for results.json, answers.jsonl and figures; none: only print", path=True
    )
    overwrite: bool = flag(False, "replace the results that --save holds")

    def validation_errors(self):
        yield from super().validation_errors()
        if not (self.data or self.gsm8k):
            yield "--data is missing; give jsonl files with prompt and response, or --gsm8k"
        yield from self.scores.validation_errors()
        if not self.seeds:
            yield "--seeds is empty; give one number or more"
        if twice := [seed for i, seed in enumerate(self.seeds) if seed in self.seeds[:i]]:
            yield f"--seeds names {twice[0]} more than once, and the same answers would count as more; name each seed once"
        yield from self.conditioning.validation_errors()
        if self.exposure_bias and not self.teacher_model:
            yield "--exposure-bias needs --teacher-model; give the folder to compare with"
        if self.exposure_bias and (given := self.teacher_layout.flags_given(self.parallel)):
            yield f"--exposure-bias asks both models in one layout; leave it out, or {given}"
        if self.exposure_bias and self.teacher_cache:
            yield "--exposure-bias reads what was written, and --teacher-cache has the responses of the data alone; leave one of them out"
        if self.teacher_cache and (given := self.teacher_layout.flags_given(self.parallel)):
            yield f"{given} is of a model, and --teacher-cache loads none; leave it out"
        if self.exposure_bias_samples > len(self.seeds):
            yield f"--exposure-bias-samples {self.exposure_bias_samples} is more than the {len(self.seeds)} --seeds; add seeds"

    def unless(self):
        curves = dict.fromkeys(("exposure_bias_samples", "exposure_bias_skip_first"), (self.exposure_bias, "without --exposure-bias"))
        told = dict.fromkeys(vars(self.teacher_layout), (self.teacher_model, "without --teacher-model"))
        told |= dict.fromkeys(vars(self.conditioning), (self.teacher_model or self.teacher_cache, "without --teacher-model"))
        return super().unless() | curves | told | {"overwrite": (self.save, "without --save")}
