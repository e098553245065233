"""--dry-run: all that is checked and known of a run before a weight is loaded, on one process in seconds; nothing is written."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megakd import begun_with
from megakd.checkpointing.model_folder import ModelFolder
from megakd.config import Config
from megakd.data.batch import Sample
from megakd.data.dataloader import DataLoader
from megakd.errors import tell
from megakd.loading import ModelFolders, grids_of
from megakd.memory import GIB, Load, RankMemory, free_bytes, memory_per_stage, written_bytes
from megakd.methods import METHODS
from megakd.models.model_provider import tensor_parallel_sizes
from megakd.models.sizes import parameter_count
from megakd.preflight import check_run_folder, continues
from megakd.run_data import RunData
from megakd.runtime.parallel_layout import Grid
from megakd.trainer import open_answers, open_checked, remarks, total_iterations

ROWS_SHOWN, ROWS_MEASURED = 2, 10_000


@dataclass(frozen=True)
class FirstReplica:
    """A place for data without process groups."""

    dp_size: int
    dp_rank: int = 0


def dry_run(config: Config) -> None:
    """Print what the run would be, on rank 0 where several were started.

    Raises:
        UserError: as the run would.
    """
    config = with_ranks(config)
    check_run_folder(config)
    folders = open_checked(config)
    if continues(config):
        begun_with.check(config, folders, begun_with.checksums(begun_with.named_by(config, folders)))
    grids = grids_of(config.parallel, config.teacher_parallel, ranks=config.preview.ranks)
    data = RunData.open(config, folders, FirstReplica(grids[0].dp_size))
    open_answers(config, folders, data)
    if os.environ.get("RANK", "0") != "0":
        return
    for remark in remarks(config, data.loader, total_iterations(config, data.loader, grids[0].dp_size)):
        tell(remark)
    print("\n".join(page(config, folders, grids, data)), flush=True)
    data.show(config.output.show_data or ROWS_SHOWN, config, folders.student.tokenizer)
    print("nothing was loaded or written; without --dry-run the same command begins", flush=True)


def with_ranks(config: Config) -> Config:
    """The number of ranks decided: --ranks, those that torchrun started, or as few as the layouts need."""
    parallel, teacher = config.parallel, config.teacher_parallel
    fewest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    if teacher.flags_given(parallel) and not teacher.own_ranks:
        tp, pp = teacher.sizes(parallel)
        fewest = math.lcm(fewest, tp * pp)
    ranks = config.preview.ranks or int(os.environ.get("WORLD_SIZE", fewest + teacher.own_ranks))
    return dataclasses.replace(config, preview=dataclasses.replace(config.preview, ranks=ranks))


def page(config: Config, folders: ModelFolders, grids: tuple[Grid, Grid], data: RunData) -> Iterator[str]:
    """What the run would be, line by line."""
    student, teacher = grids
    apart = f"; the teacher {layout(teacher)}" if folders.teachers and teacher != student else ""
    yield f"dry run of --method {config.method} on {config.preview.ranks} rank(s), {layout(student)}{apart}"
    for name, folder in (("student", folders.student), *((f"teacher {name}".strip(), one) for name, one in folders.teachers.items())):
        yield f"  {name:9} {model_line(folder)}"
    load = load_of(config, data.loader, student)
    answered = " with its response" if load.written else ""
    yield f"  data      {len(data.loader.dataset):,} rows, the longest of {load.length:,} tokens{answered}"
    yield f"  batch     {batch_line(config, data.loader, student, load)}"
    checkpoint, export = (f"{size / GIB:.2f}" for size in written_bytes(config, folders))
    free = free_bytes(Path(config.output.save)) / GIB
    yield f"  disk      GiB of a checkpoint {checkpoint}, of the export {export}; free for --save {free:.1f}"
    stages = memory_per_stage(config, folders.student.config, [teacher.config for teacher in folders.teachers.values()], grids, load)
    largest = max(range(len(stages)), key=lambda stage: stages[stage].peak)
    yield f"  memory    GiB a rank by formula, beside some 0.5 of Python and libraries{f', stage {largest}' if len(stages) > 1 else ''}:"
    yield f"            {memory_line(stages[largest])}"


def layout(grid: Grid) -> str:
    """As people say it."""
    return f"TP {grid.tp_size} × PP {grid.pp_size} × DP {grid.dp_size}"


def model_line(folder: ModelFolder) -> str:
    """What a model is, and the layouts that fit it."""
    hf = folder.config
    sizes = ", ".join(map(str, tensor_parallel_sizes(hf)))
    millions = parameter_count(hf) / 1e6
    return f"{folder.path}: {hf.model_type}, {millions:,.1f} M parameters; TP may be {sizes}; PP 1 to {hf.num_hidden_layers}"


def load_of(config: Config, loader: DataLoader, grid: Grid) -> Load:
    """The rows of an iteration on one replica, and the longest that a row of the first ten thousand is, or can become."""
    written = METHODS[config.method].answers_prompts(config)
    rows: Sequence[Sample] = [loader.dataset[i] for i in range(min(ROWS_MEASURED, len(loader.dataset)))]
    lengths = [min(config.data.max_length, len(row.prompt) + config.max_new_tokens) if written else row.num_positions for row in rows]
    training, device = config.training, "cuda" if torch.cuda.is_available() else "cpu"
    limits, replica = (training.micro_batch_size, training.micro_batch_tokens), training.global_batch_size // grid.dp_size
    tokens = largest_micro_batch(lengths, *limits, pack=training.pack)
    return Load(replica, micro_batches_of(lengths, replica, *limits), max(lengths), tokens, written, device)


def micro_batches_of(lengths: Sequence[int], rows: int, most: int, most_tokens: int | None) -> int:
    """How many `rows` of the longest make at least: as many as both limits ask for."""
    longest = sorted(lengths)[-rows:]
    positions = sum(longest) * rows / len(longest)  # of the data fewer may have been looked at
    return max(math.ceil(rows / most), math.ceil(positions / max(most_tokens, longest[-1])) if most_tokens else 1)


def largest_micro_batch(lengths: Sequence[int], most: int, most_tokens: int | None, *, pack: bool) -> int:
    """Positions that it can have: packed those of the longest rows, else as many as there are rows times those of the longest."""
    longest = max(lengths)
    tokens = sum(sorted(lengths)[-most:]) if pack else most * longest
    return tokens if most_tokens is None else min(tokens, max(most_tokens, longest))


def batch_line(config: Config, loader: DataLoader, grid: Grid, load: Load) -> str:
    """How an iteration is made, and how many there are."""
    steps, training = total_iterations(config, loader, grid.dp_size), config.training
    epochs = steps / loader.iterations_per_epoch
    parts = f"{grid.dp_size} replica(s) × {load.micro_batches} micro-batch(es) × {training.micro_batch_size} row(s)"
    if most := training.micro_batch_tokens:
        each = f"at most {training.micro_batch_size} row(s) and {most:,} positions"
        parts = f"{grid.dp_size} replica(s) × {load.rows} row(s), of the longest {load.micro_batches} micro-batch(es) or more of {each}"
    parts += ", packed" * training.pack
    answers = loader.num_generations
    of = f" ({loader.rows_per_batch} prompts × {answers} answers)" if answers > 1 else ""
    return f"{training.global_batch_size} rows an iteration{of} = {parts}; {steps:,} iteration(s) = {epochs:.2f} epochs"


def memory_line(memory: RankMemory) -> str:
    """In GiB: what is always there, and the largest of what comes and goes."""
    gib = {name: f"{name} {size / GIB:.2f}" for name, size in vars(memory).items()}
    always = ", ".join(gib[name] for name in ("weights", "gradients", "optimizer", "teacher"))
    return f"{always}; and of {gib['rollout']}, {gib['step']}, {gib['update']} the largest: peak {memory.peak / GIB:.2f}"
