"""Data sets × seeds in one run: answers, their scores, held-out losses and exposure bias, the same on every rank.

    results = evaluate(EvaluateConfig(model="student", data=("test.jsonl",), ...))
    results["sets"]["test"]           numbers by name; over seeds the mean, and `<name>_sd` (n - 1) where there are two or more
    results["seeds"]["test"]["10"]    what each seed gave
    results["exposure_bias"]["test"]  curves by length
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megakd.checkpointing.description import versions
from megakd.config import EvaluateConfig
from megakd.evaluation.evaluation_set import EvaluationSet, open_sets
from megakd.evaluation.exposure_bias import accumulated, exposure_bias, token_divergences
from megakd.evaluation.held_out import held_out_losses
from megakd.evaluation.report import Report, check_folder, notes, print_table
from megakd.evaluation.scoring import answer_texts, score_together
from megakd.generation.answers import Writer, hidden_ids, open_folders, sampling_of
from megakd.generation.progress import Progress
from megakd.generation.sampling import Sampling
from megakd.loading import frozen, start_apart
from megakd.runtime.initialize import is_rank_zero
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.teachers.live import LiveStudent
from megakd.teachers.relayed import in_its_layout
from megakd.teachers.stored import StoredTeacher
from megakd.teachers.teacher import Teacher

AT_LENGTH = 16  # the response length at which MiniLLM's code prints ExAccErr; the last one where responses are shorter


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All scores; with --save also results.json, answers.jsonl and figures.

    Raises:
        UserError: something does not fit; before any weight is loaded where that can be known.
    """
    config.check()
    check_folder(config)
    began = time.perf_counter()
    folders = open_folders(config, config.teacher_model, config.teacher_cache)
    tokenizer = folders.student.tokenizer
    new_tokens = config.responses.max_new_tokens if config.exposure_bias else 0
    options = {"template": config.responses.prompt_template, "taken": int(config.add_bos), "new_tokens": new_tokens}
    sets = open_sets(config, tokenizer, folders.conditioning(config.conditioning, **options))
    for data in sets if folders.store else ():
        folders.store.check_texts(data, where=data.where)
    places = start_apart(config.parallel, config.teacher_layout)
    layout = places.student
    report = Report(config.save if is_rank_zero() else "")
    student, models = folders.load_apart(places, config.dtype)
    written = [Writer.of(folder, model, config.responses.batch_size) for model, folder in zip((frozen(student), *models), folders)]
    writers = dict(zip(("student", "teacher"), written))
    teacher = StoredTeacher(folders.store, student) if folders.store else None
    if models:
        teacher = in_its_layout(places.grids, student, *models)
    scores = Evaluator(config, sets, tokenizer, writers, teacher, report).run()
    ends_of = {name: asdict(writer.ends) for name, writer in writers.items()}
    results = {**describe(config, layout), "ends": ends_of, "seconds": time.perf_counter() - began, **scores}
    results["notes"] = notes(results)
    if is_rank_zero():
        report.finish(results)
        print_table(results)
    return results


def describe(config: EvaluateConfig, layout: ParallelLayout) -> dict[str, Any]:
    """What made the numbers."""
    sizes = {"tensor_parallel": layout.tp_size, "pipeline_parallel": layout.pp_size, "data_parallel": layout.dp_size}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"config": config.flat(), "versions": versions(), "layout": sizes, "device": device}


class Evaluator:
    """One run on this rank. `writers` are the student and, where there is one, the teacher, who is read as `teacher` says."""

    def __init__(
        self,
        config: EvaluateConfig,
        sets: Sequence[EvaluationSet],
        tokenizer: PreTrainedTokenizerBase,
        writers: dict[str, Writer],
        teacher: Teacher | None,
        report: Report,
    ) -> None:
        self.config, self.sets, self.tokenizer, self.writers, self.report = config, sets, tokenizer, writers, report
        self.hidden = hidden_ids(tokenizer)
        self.model, self.soft_prompt = writers["student"].model, writers["student"].soft_prompt
        self.teacher = teacher
        settings = config.responses
        seeds = config.seeds[:1] if settings.greedy else config.seeds  # a greedy answer is the same for every seed
        self.scored = {seed: sampling_of(settings, seed) for seed in seeds}
        bias_seeds = config.seeds[: config.exposure_bias_samples] if config.exposure_bias else ()
        self.drawn = {seed: Sampling(max_new_tokens=settings.max_new_tokens, seed=seed) for seed in bias_seeds}
        passes = {("student", sampling) for sampling in self.scored.values()}
        passes |= {(writer, sampling) for writer in writers for sampling in self.drawn.values()}
        self.progress = Progress(len(passes) * sum(map(len, sets)))
        self._written: dict[tuple[str, Sampling], list[list[int]]] = {}  # of the set in hand

    def run(self) -> dict[str, dict[str, Any]]:
        """Set by set, in the order of the command line."""
        results: dict[str, dict[str, Any]] = {"sets": {}, "seeds": {}, "exposure_bias": {}}
        for data in self.sets:
            self._written.clear()
            seeds = {str(seed): self.scores(data, seed) for seed in self.scored}
            numbers = {"samples": len(data), **over_seeds(list(seeds.values())), **data.unseen(), **self.losses(data)}
            if self.drawn:
                curves = self.exposure_bias(data)
                numbers["ex_acc_err"] = curves["ex_acc_err"][: AT_LENGTH][-1]
                results["exposure_bias"][data.name] = curves
            results["sets"][data.name], results["seeds"][data.name] = numbers, seeds
        return results

    def losses(self, data: EvaluationSet) -> dict[str, float]:
        """On the gold responses."""
        options = {"micro_batch_size": self.config.micro_batch_size, "soft_prompt": self.soft_prompt}
        return held_out_losses(self.model, self.teacher, samples=list(data), **options)

    def responses(self, data: EvaluationSet, writer: str, sampling: Sampling) -> list[list[int]]:
        """One response a sample, in the order of the file, on every rank. None is written twice."""
        if (writer, sampling) not in self._written:
            responses = self._written[writer, sampling] = []
            asked = data.teacher_questions() if writer == "teacher" else data.questions()
            for chunk in self.writers[writer].answer(asked, sampling):
                responses += chunk
                self.progress.advance(len(chunk), f"{data.name}, {writer}, seed {sampling.seed}")
        return self._written[writer, sampling]

    def scores(self, data: EvaluationSet, seed: int) -> dict[str, float]:
        """Means over the set of one pass of answers."""
        responses = self.responses(data, "student", self.scored[seed])
        said = [self.writers["student"].ends.without_end(tokens) for tokens in responses]
        answers = answer_texts(self.tokenizer, data, said)
        rows = score_together(data.score, answers, dist.group.WORLD)
        for row, tokens in zip(rows, said):
            row |= {"response_length": len(tokens), "hidden_tokens": sum(token in self.hidden for token in tokens)}
        self.report.add_answers(data, seed, answers, responses, rows)
        return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}

    def exposure_bias(self, data: EvaluationSet) -> dict[str, list[float | None]]:
        """Curves over the response length."""
        length, skip_first = self.config.responses.max_new_tokens, self.config.exposure_bias_skip_first
        curves = []
        for writer in self.writers:
            draws = [self.divergences(data, writer, seed) for seed in self.drawn]
            curves.append(np.stack([accumulated(rows, length, skip_first=skip_first) for rows in zip(*draws)]))
        return exposure_bias(*curves)

    def divergences(self, data: EvaluationSet, writer: str, seed: int) -> list[np.ndarray]:
        """KL(p‖q) at every token of what `writer` draws."""
        responses = self.responses(data, writer, self.drawn[seed])
        samples = [replace(sample, response=tuple(response)) for sample, response in zip(data.questions(), responses)]
        student = LiveStudent(self.model, self.soft_prompt)
        rows = token_divergences(student, self.teacher, samples, micro_batch_size=self.config.micro_batch_size)
        self.report.add_divergences(data, writer, seed, samples, rows)
        return rows


def over_seeds(seeds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every metric, and its sample standard deviation where there are two seeds or more."""
    numbers = {}
    for name in seeds[0]:
        values = [row[name] for row in seeds]
        numbers[name] = statistics.fmean(values)
        if len(values) > 1:
            numbers[f"{name}_sd"] = statistics.stdev(values)
    return numbers
