"""python -m megakd.verify: one iteration of a user's own models at a layout and on one rank, and what differs.

    rows        a few of random tokens, the same for both
    compared    logits of student and teacher at every supervised position, losses, the gradient's norm, losses after a step

The exit code is 0 where all differences are within the tolerance, 1 where one is not. It starts its ranks itself, so that two processes
never share torch.distributed; under torchrun the ranks are torchrun's, and rank 0 starts the one beside them.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megakd_kernels import VocabShard
from safetensors.torch import save_file
from torch import Tensor

from megakd.config import TrainingConfig, parse
from megakd.config.verify import VerifyConfig
from megakd.data.batch import Batch, Sample, micro_batches
from megakd.data.dataloader import split_across_dp
from megakd.errors import GRACE_SECONDS, UserError, told_in_one_line
from megakd.loading import ModelFolders, check_context, start
from megakd.losses.distillation import Divergence, kd_loss, sft_loss
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.safetensors_file import read_tensors
from megakd.optimizer import StudentOptimizer
from megakd.runtime.initialize import is_rank_zero, process_group_closed_at_exit
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.schedules import TOKENS, forward_backward, supervised_hidden
from megakd.teachers.live import LiveTeacher

MICRO_BATCH = 2  # rows: more than one micro-batch, so that stages have more than one in flight
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "ROLE_RANK")
Found = dict[str, Tensor]


# ---- one layout


def measure(config: VerifyConfig) -> Found | None:
    """What this layout says, by name, on rank 0; None on the others.

    Raises:
        UserError: the models do not fit the layout, or each other.
    """
    check_ranks(config)
    folders = ModelFolders.open(config.model, {"": config.teacher_model} if config.teacher_model else {})
    folders.check(config.parallel)
    for folder in folders:
        check_context(folder, config.length, 0, f"--length {config.length}", "use --length {} or less")
    layout = start(config.parallel, seed=config.seed)
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    options = {"sequence_parallel": config.parallel.sequence_parallel, "student": no_dropout, "teacher": no_dropout}
    student, *teachers = folders.load(layout, config.dtype, **options)
    batches = own_batches(config, student.real_vocab_size, layout)
    found = {f"{name} logits": logits(model, batches) for name, model in zip(("student", "teacher"), (student, *teachers))}
    found |= learn(config, student, teachers, batches)
    return found if is_rank_zero() else None


def check_ranks(config: VerifyConfig) -> None:
    """A launcher has started as many as the layout has.

    Raises:
        UserError: it has started others.
    """
    started, one = int(os.environ.get("WORLD_SIZE", "1")), config.ranks // config.replicas
    if started != config.ranks:
        way_out = f"--replicas {started // one}" if started % one == 0 else f"torchrun --nproc_per_node {config.ranks}"
        said = f"{started} rank(s) were started, and --replicas {config.replicas} of TP × PP = {one} need {config.ranks}"
        raise UserError(f"{said}; use {way_out}")


def own_batches(config: VerifyConfig, vocabulary: int, layout: ParallelLayout) -> list[Batch]:
    """This replica's part of rows that depend on the seed alone."""
    draw = random.Random(config.seed)
    rows = []
    for number in range(config.rows):
        ids = [draw.randrange(vocabulary) for _ in range(config.length - number % 3)]
        rows.append(Sample(number, tuple(ids[:4]), tuple(ids[4:])))
    return micro_batches(split_across_dp(rows, layout.dp_size)[layout.dp_rank], MICRO_BATCH, device=layout.device)


def logits(model: HiddenStateGPTModel, batches: list[Batch]) -> Tensor:
    """[tokens, vocabulary] in float32 at all supervised positions of all replicas, rows in the order of their ids, on every rank."""
    layout, own = model.layout, {}
    for hidden, batch in zip(supervised_hidden(model, batches), batches):
        part = (hidden @ model.output_weight().detach().t()).float()
        shards = [torch.empty_like(part) for _ in range(layout.tp_size)]
        dist.all_gather(shards, part.contiguous(), group=layout.tp_group)
        whole = torch.cat(shards, -1)[:, : model.real_vocab_size].cpu()
        own |= dict(zip(batch.sample_ids.tolist(), whole.split(batch.response_lengths.tolist())))
    everywhere: list[dict[int, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everywhere, own if layout.tp_rank == 0 else {})
    by_row = {number: rows for part in everywhere for number, rows in part.items()}
    return torch.cat([by_row[number] for number in sorted(by_row)])


def learn(config: VerifyConfig, student: HiddenStateGPTModel, teachers: list[HiddenStateGPTModel], batches: list[Batch]) -> Found:
    """Losses and the gradient's norm of one step, and the losses after it."""
    settings = TrainingConfig(lr=1e-3, lr_decay_style="constant", clip_grad=1.0)
    optimizer = StudentOptimizer(student, settings, total_iters=1, distributed=config.parallel.use_distributed_optimizer)
    layout = student.layout
    vocabulary = VocabShard(student.real_vocab_size, tp_group=layout.tp_group)
    teacher = LiveTeacher(teachers[0]) if teachers else None

    def loss(q, batch, p):
        labels = batch.supervised_labels
        return kd_loss(q, p, labels, vocabulary, kd_ratio=0.5, divergence=Divergence()) if teacher else sft_loss(q, labels, vocabulary)

    def gradients() -> Found:
        optimizer.zero_grad()
        context = teacher.read(batches, to=layout) if teacher else ()
        means = forward_backward(optimizer.ddp, batches, loss, context=context, layout=layout)
        return {name: value for name, value in means.items() if name != TOKENS}

    student.train()
    before = gradients()
    norm = optimizer.step(1)["grad_norm"]
    after = {f"{name} after a step": value for name, value in gradients().items()}
    return {name: torch.as_tensor(float(value)) for name, value in (before | {"gradient norm": norm} | after).items()}


# ---- two layouts


def compare(ours: Mapping[str, Tensor], alone: Mapping[str, Tensor], tolerance: float) -> Iterator[tuple[str, bool]]:
    """A line for each name, and whether the two agree in it: their largest difference as a share of the largest number."""
    for name, one in alone.items():
        difference, largest = (ours[name] - one).abs().max().item(), one.abs().max().item()
        fits = difference <= tolerance * max(largest, 1e-6)  # false of NaN
        yield f"  {name:32} {largest:12.6g} {difference:12.3g} {'' if fits else '  <- differs'}".rstrip(), fits


def report(config: VerifyConfig, ours: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> bool:
    """Print the comparison; whether all is within the tolerance."""
    parallel = config.parallel
    said = f"TP {parallel.tensor_model_parallel_size} × PP {parallel.pipeline_model_parallel_size} × DP {config.replicas}"
    print(f"{said} and one rank, {config.dtype}\n  {'':32} {'largest':>12} {'difference':>12}")
    found = list(compare(ours, alone, config.largest_difference))
    print("\n".join(line for line, _ in found))
    agree = all(fits for _, fits in found)
    print(f"the layouts {'agree' if agree else 'differ by more than is allowed'}: {config.largest_difference:g} of the largest", flush=True)
    return agree


def in_processes(arguments: list[str], config: VerifyConfig, ranks: int) -> Found:
    """What `ranks` processes of their own say.

    Raises:
        UserError: they failed, having said why.
    """
    alone = ["--tp", "1", "--pp", "1", "--replicas", "1", "--no-sequence-parallel", "--no-use-distributed-optimizer"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.safetensors"
        words = ["-m", "megakd.verify", *arguments, *(alone if ranks == 1 else []), "--out", str(file)]
        started = [subprocess.Popen([sys.executable, *words], env=place) for place in environments(ranks)]
        codes = ended(started)
        if any(codes) or not file.is_file():
            raise UserError(f"the {ranks} rank(s) of {config.model} ended with exit code {max(codes)} and no result; see above")
        return read_tensors(file)


def environments(ranks: int) -> Iterator[dict[str, str]]:
    """Of each rank, as torchrun would make them; of this process what says nothing of ranks."""
    own = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN and not name.startswith("TORCHELASTIC")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    for rank in map(str, range(ranks)):
        yield own | meet | {"LOCAL_WORLD_SIZE": str(ranks), "RANK": rank, "LOCAL_RANK": rank}


def ended(started: list[subprocess.Popen]) -> list[int]:
    """Exit codes of all. One that fails ends the others, which would wait for it."""
    while any(process.poll() is None for process in started):
        if any(process.poll() for process in started):
            time.sleep(GRACE_SECONDS)  # who has a message of its own tells it
            for process in started:
                process.terminate()
        time.sleep(0.1)
    return [process.returncode for process in started]


def verify(arguments: list[str]) -> bool:
    """Whether the layout says what one rank says; True on ranks that have nothing to compare."""
    config = parse(arguments, VerifyConfig, program="megakd.verify")
    if not config.out and "RANK" not in os.environ:
        return report(config, in_processes(arguments, config, config.ranks), in_processes(arguments, config, 1))
    with process_group_closed_at_exit():
        found = measure(config)
    if found is None:
        return True
    if config.out:
        save_file(found, config.out)
        return True
    return report(config, found, in_processes(arguments, config, 1))


if __name__ == "__main__":
    with told_in_one_line():
        sys.exit(0 if verify(sys.argv[1:]) else 1)
