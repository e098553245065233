"""A rank from its settings to its record: models from their configs, the method's own iteration, evaluation and checkpoints."""

from __future__ import annotations

import pkgutil
import time
import traceback
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from transformers import AutoConfig, PretrainedConfig

from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.training import load_checkpoint, save_checkpoint, sharded_state
from megakd.config import Config
from megakd.config.parse import from_values
from megakd.data.batch import Sample
from megakd.data.dataloader import DataLoader
from megakd.data.end_ids import EndIds
from megakd.generation.generate import generate
from megakd.loading import align_vocabularies, frozen, start
from megakd.methods import build_method, rollout
from megakd.methods.base import Method
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.lora import adapt
from megakd.models.model_provider import build_model
from megakd.reporting.stopwatch import Stopwatch
from megakd.runtime.deterministic import deterministic_mode
from megakd.runtime.initialize import resolve_dtype, seed_everything
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.simulation import torch_cuda
from megakd.simulation.cards import CARDS
from megakd.simulation.device import Device
from megakd.simulation.record import Message, Record
from megakd.simulation.settings import Simulated
from megakd.teachers.build import in_the_students_layout
from megakd.teachers.teacher import Teacher
from megakd.trainer import student_options, teacher_options, teacher_weights, valid_losses

TOTAL_ITERS, END, PROMPT_TOKEN, TOKEN = 1000, 2, 3, 4


def record_of(asked: Simulated) -> Record:
    """Its last iteration, and what is done behind it. Afterwards this process is good for nothing else."""
    record = Record()
    device = Device(record, CARDS[asked.card])
    torch_cuda.install(device, asked.rank, asked.world_size)
    config = from_values(asked.flags)
    mode = deterministic_mode(config.training.deterministic_mode)
    try:
        with device, in_parts(device), responses_end(asked), names_told(asked, device), mode:
            run = Run(asked, config, device)
            run.iterate()
            for step in asked.after:
                with device.part(step):
                    getattr(run, step)()
    except BaseException:  # torch's CheckpointException is no Exception; whatever it is, the caller reads it
        record.failure = traceback.format_exc()
    return record


class Run:
    """What pretrain_kd.py builds, from configs alone."""

    def __init__(self, asked: Simulated, config: Config, device: Device):
        self.asked, self.config, self.device = asked, config, device
        if asked.plant:
            pkgutil.resolve_name(asked.plant)(device)
        self.layout = start(config.parallel, seed=config.training.seed)
        self.loader = DataLoader(
            rows_of(asked),
            global_batch_size=config.training.global_batch_size,
            seed=config.training.seed,
            dp_rank=self.layout.dp_rank,
            dp_size=self.layout.dp_size,
            num_generations=config.generation.num_generations,
        )
        with device.part("student"):
            self.student_config = config_of(asked.student)
            student, self.ends = self._model(self.student_config, student_options(config)), EndIds((END,), END)
            if config.lora.rank:
                adapt(student, config.lora, seed=config.training.seed)
        with device.part("teacher weights"):
            teacher = self._teacher()
        with device.part("gradients and optimizer"):
            text = self.loader if config.method == "minillm" and config.minillm.lm_coef else None
            self.method: Method = build_method(config, student, teacher, Tokenizer(), self.ends, text, total_iters=TOTAL_ITERS)

    def _model(self, hf: PretrainedConfig, options: dict) -> HiddenStateGPTModel:
        configs = [config_of(json) for json in (self.asked.student, self.asked.teacher) if json]
        width = align_vocabularies([config.vocab_size for config in configs], self.layout.tp_size)
        sequence_parallel = self.config.parallel.sequence_parallel
        dtype = resolve_dtype(self.config.models.dtype)
        return build_model(hf, self.layout, dtype=dtype, sequence_parallel=sequence_parallel, **width, **options)

    def _teacher(self) -> Teacher | None:
        if not self.config.needs_teacher:
            return None
        model = frozen(self._model(config_of(self.asked.teacher or self.asked.student), teacher_options(self.config)))
        return in_the_students_layout(self.config, self.loader.samples(0), model)

    def iterate(self) -> None:
        """As many as are asked for. After the first, moments and whatever else an iteration leaves are there."""
        record = self.device.record
        for iteration in range(1, self.asked.iterations + 1):
            record.begin()
            self.device.memory.begin()
            began = time.perf_counter()
            with self.device.part("other"):
                seed_everything(self.config.training.seed, self.layout, iteration=iteration)
                record.logged = self.method.train_iteration(self.loader, iteration)
            record.seconds = time.perf_counter() - began
            record.resident = {part: size for part, size in self.device.memory.by_maker.items() if size}

    # ---- behind it

    def evaluate(self) -> None:
        """Held-out losses of the same rows."""
        valid_losses(self.method, self.loader.samples(0))

    def save(self) -> None:
        """A checkpoint of the run; without a folder what would be written, for several ranks cannot agree on a file."""
        if not self.asked.folder:
            sharded_state(self.method.student, self.method.optimizer.optimizer, is_loading=False)
            return
        source = ModelFolder(Path(self.asked.source), "--model", self.student_config, Path(self.asked.source), source=None)
        extra, teacher = self.method.extra_tensors(), teacher_weights(self.method.teacher)
        options = {"optimizer": self.method.optimizer.optimizer, "source": source, "extra_tensors": extra, "teacher": teacher}
        save_checkpoint(self.asked.folder, self.asked.iterations, model=self.method.student, **options)

    def load(self) -> None:
        """The same checkpoint."""
        if not self.asked.folder:
            sharded_state(self.method.student, self.method.optimizer.optimizer, is_loading=True)
            return
        optimizer, teacher = self.method.optimizer.optimizer, teacher_weights(self.method.teacher)
        extra = load_checkpoint(self.asked.folder, self.asked.iterations, model=self.method.student, optimizer=optimizer, teacher=teacher)
        self.method.restore(extra)


def config_of(json: dict) -> PretrainedConfig:
    """From what a config.json holds."""
    return AutoConfig.for_model(**json)


def rows_of(asked: Simulated) -> list[Sample]:
    """A global batch."""
    sizes = zip(asked.prompts, asked.responses)
    return [Sample(i, (PROMPT_TOKEN,) * prompt, (TOKEN,) * response) for i, (prompt, response) in enumerate(sizes)]


@contextmanager
def in_parts(device: Device):
    """The stopwatch's names are the record's."""

    @contextmanager
    def part(self, name: str):
        device.wait("synchronize")
        with device.part(name):
            yield
            device.wait("synchronize")

    with patch.object(Stopwatch, "__call__", part):
        yield


@contextmanager
def responses_end(asked: Simulated):
    """No token of a device has a value: the rows' own lengths say where a response ends."""

    def limited(model, prompts, sample_ids: Sequence[int], sampling, **options):
        limits = [asked.responses[i] for i in sample_ids]
        return generate(model, prompts, sample_ids, sampling, limits=limits, **options)

    with patch.object(rollout, "generate", limited):
        yield


@contextmanager
def names_told(asked: Simulated, device: Device):
    """What travels pickled from the last stage to the others: noted there, taken from `asked` here."""
    told = iter(asked.told)

    def object_from_last_stage(layout: ParallelLayout, value):
        if layout.pp_size == 1:
            return value
        ranks = tuple(torch.distributed.get_process_group_ranks(layout.pp_group))
        device.record.messages.append(Message(device.record.part, "object from the last stage", ranks, None, 0, by_host=True))
        device.wait("objects")
        if layout.is_last_stage:
            device.record.told.append(value)
            return value
        return type(value)(next(told, value))

    with patch.object(ParallelLayout, "object_from_last_stage", object_from_last_stage):
        yield


class Tokenizer(SimpleNamespace):
    """As far as a method asks for one."""

    eos_token_id = END
    encode = staticmethod(lambda text, **options: [5, 6, 7])
