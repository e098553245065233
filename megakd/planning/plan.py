"""From a configuration and two config.json to what each layout needs: memory by part of the iteration, messages, a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PretrainedConfig

from megakd.config.models import SELF
from megakd.config.plan import PlanConfig
from megakd.models.hf_config import load_hf_config
from megakd.models.model_provider import family_of
from megakd.planning.depth import Line, shallow
from megakd.planning.layouts import Layout, layouts_of
from megakd.simulation.cards import CARDS, Card
from megakd.simulation.ranks import simulate
from megakd.simulation.record import Record, Work
from megakd.simulation.settings import Simulated

OUTSIDE_GIB = 2.5  # CUDA's context, cuBLAS's workspace, NCCL's buffers, what the allocator cannot use: not simulated [estimate]
ITERATIONS = 2  # the first makes the moments
PIPELINED = ("teacher", "prompt_step", "student_step")  # parts through which micro-batches go in a pipeline


@dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage."""

    number: int
    peaks: dict[str, float]  # bytes by part
    alive: dict[str, dict[str, float]]  # at each part's peak, by the part that made them
    works: dict[str, Work]
    messages: dict[tuple[str, int], tuple[float, float]]  # operation, ranks of the group: calls, bytes

    @property
    def peak_part(self) -> str:
        """Where memory is highest."""
        return max(self.peaks, key=self.peaks.__getitem__)


@dataclass(frozen=True)
class Plan:
    """Of one layout: its first and its last stage."""

    layout: Layout
    card: Card
    stages: list[Stage]
    micro_batches: int

    @property
    def fullest(self) -> Stage:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.peaks[stage.peak_part])

    @property
    def peak_gib(self) -> float:
        """Of torch's allocator, on the fullest rank."""
        return self.fullest.peaks[self.fullest.peak_part] / 2**30

    @property
    def need_gib(self) -> float:
        """That, and what lies outside of the allocator."""
        return self.peak_gib + OUTSIDE_GIB

    @property
    def fits(self) -> bool:
        """Whether there is so much on the card."""
        return self.need_gib <= self.card.memory_gib

    def seconds(self, part: str) -> float:
        """By roofline: the device's work and messages, or the host's launches where these take longer; stages that wait are counted."""
        slowest = max((max(w.device_s + w.message_s, w.host_s) for s in self.stages if (w := s.works.get(part))), default=0.0)
        waiting = (self.micro_batches + self.layout.pp - 1) / self.micro_batches if part in PIPELINED else 1.0
        return slowest * waiting

    @property
    def parts(self) -> list[str]:
        """In the order of the iteration."""
        return list(dict.fromkeys(part for stage in self.stages for part in stage.works))

    @property
    def iteration_s(self) -> float:
        """The sum of its parts."""
        return sum(map(self.seconds, self.parts))


def plans(config: PlanConfig) -> list[Plan]:
    """Of each layout that is asked for: those that fit first, and of these the quickest.

    Raises:
        UserError: a model, or no layout, fits; or there is no compiler.
    """
    models = models_of(config)
    found = [(layout, ranks_of(config, models, layout)) for layout in layouts_of(config, models)]
    records = iter(simulate([rank for _, ranks in found for rank in ranks]))
    made = [plan_of(config, models, layout, [next(records) for _ in ranks]) for layout, ranks in found]
    return sorted(made, key=lambda plan: (not plan.fits, plan.iteration_s))


def models_of(config: PlanConfig) -> dict[str, PretrainedConfig]:
    """By the flag that names each."""
    folders = {"--model": config.models.model}
    if config.needs_teacher:
        teacher = config.models.teachers[""]
        folders["--teacher-model"] = config.models.model if teacher == SELF else teacher
    models = {flag: load_hf_config(Path(folder), flag=flag) for flag, folder in folders.items()}
    for flag, model in models.items():
        family_of(model, flag=flag, name=folders[flag])
    return models


def depths_of(models: dict[str, PretrainedConfig]) -> tuple[int, int]:
    """Layers of student and teacher, 0 where there is none."""
    teacher = models.get("--teacher-model")
    return models["--model"].num_hidden_layers, teacher.num_hidden_layers if teacher else 0


def ranks_of(config: PlanConfig, models: dict[str, PretrainedConfig], layout: Layout) -> list[Simulated]:
    """The shallow runs, of each the first rank of the first and of the last stage."""
    ranks = []
    for depths in shallow(*depths_of(models), layout.pp):
        first = simulated(config, models, layout, depths)
        ranks += [replace(first, rank=stage * layout.tp * layout.dp) for stage in stages_of(layout)]
    return ranks


def stages_of(layout: Layout) -> list[int]:
    """Those in the middle need less than the first and the last."""
    return sorted({0, layout.pp - 1})


def simulated(config: PlanConfig, models: dict[str, PretrainedConfig], layout: Layout, depths: tuple[int, int]) -> Simulated:
    """A run as the flags say, in another layout and of other depths."""
    plan, training = config.plan, config.training
    beside = set(type(plan)().__dataclass_fields__)
    flags = {name: value for name, value in config.flat().items() if name not in beside}
    flags |= {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp, "train_iters": 1000, "epochs": None}
    flags |= {"sequence_parallel": config.parallel.sequence_parallel and layout.tp > 1, "train_data": "rows", "save": "run"}
    flags |= {"dtype": "bf16" if config.models.dtype == "auto" else config.models.dtype}
    prompt, response = row_of(config)
    student, *teacher = (with_layers(model, count) for model, count in zip(models.values(), depths))
    rows = training.global_batch_size
    return Simulated(
        flags=flags,
        student=student,
        teacher=next(iter(teacher), None),
        world_size=layout.tp * layout.pp * layout.dp,
        card=plan.gpu,
        prompts=[prompt] * rows,
        responses=[response] * rows,
        iterations=ITERATIONS,
    )


def row_of(config: PlanConfig) -> tuple[int, int]:
    """Tokens of every prompt and of every response."""
    prompt = config.plan.prompt_tokens or config.data.max_prompt_length
    return prompt, min(config.plan.response_tokens or config.max_new_tokens, config.data.max_length - prompt)


def micro_batches_of(config: PlanConfig, rows: int) -> int:
    """How many `rows` make, within both limits of one."""
    most, tokens = config.training.micro_batch_size, config.training.micro_batch_tokens
    if tokens:
        most = min(most, max(1, tokens // (sum(row_of(config)) - 1)))
    return -(-rows // most)


def with_layers(model: PretrainedConfig, count: int) -> dict:
    """Its config.json with so many layers."""
    told = model.to_dict()
    for name in {"num_hidden_layers", model.attribute_map.get("num_hidden_layers", "num_hidden_layers")} & told.keys():
        told[name] = count
    told.pop("layer_types", None)  # one a layer, which transformers fills in
    return told


def plan_of(config: PlanConfig, models: dict[str, PretrainedConfig], layout: Layout, records: list[Record]) -> Plan:
    """The whole models, from the records of `ranks_of`."""
    whole = depths_of(models)
    line, stages = Line.through(shallow(*whole, layout.pp), whole), stages_of(layout)
    for record in records:
        if record.failure:
            raise RuntimeError(f"the simulation of {layout} ended with\n{record.failure}")
    by_stage = [stage_of(number, line, records[place :: len(stages)]) for place, number in enumerate(stages)]
    per_replica = config.training.global_batch_size // layout.dp
    return Plan(layout, CARDS[config.plan.gpu], by_stage, micro_batches_of(config, per_replica))


def stage_of(number: int, line: Line, records: list[Record]) -> Stage:
    """One stage, by its records at every depth."""
    counted = [messages_of(record) for record in records]
    keys = dict.fromkeys(key for table in counted for key in table)
    messages = {key: tuple(line([table.get(key, (0, 0))[i] for table in counted]) for i in (0, 1)) for key in keys}
    peaks = line.of_tables([record.peaks for record in records])
    alive = line.of_nested(records, lambda record: record.alive)
    return Stage(number, peaks, alive, line.of_works([record.parts for record in records]), messages)


def messages_of(record: Record) -> dict[tuple[str, int], tuple[int, int]]:
    """Calls and bytes by operation and size of the group; of one rank alone there are none."""
    calls, sizes = Counter(), Counter()
    for message in record.messages:
        if len(message.ranks) > 1:
            key = message.operation.strip("_"), len(message.ranks)
            calls[key] += 1
            sizes[key] += message.bytes
    return {key: (calls[key], sizes[key]) for key in calls}
