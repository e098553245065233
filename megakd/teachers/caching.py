"""Writing a teacher's targets: scripts/cache_teacher.py.

The texts of all data files, each once, in their order, are cut into files of so many bytes. A file is the work of one replica, so neither
layout nor batch size decide what stands in which; one that is there is not written again.

N supervised positions, V ids that count, H hidden size, K tokens kept.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megakd_kernels.heads.fused_linear import CHUNK_ROWS, CPU_CHUNK_ROWS
from torch import Tensor

from megakd.checkpointing.fingerprint import checksum, model_files
from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.teacher_store import (
    DESCRIPTION,
    HEAD,
    Description,
    copy_teacher,
    key_of,
    targets_file,
    write_targets,
    write_tensors,
)
from megakd.config import CacheConfig
from megakd.data.batch import Sample, micro_batches
from megakd.data.conditioning import Conditioning
from megakd.data.open_data import open_responses
from megakd.errors import UserError, file_errors
from megakd.loading import (
    AS_THE_STUDENT,
    align_vocabularies,
    check_context,
    check_tokenizers,
    frozen,
    grids_of,
    load_model,
    start,
)
from megakd.losses.token_loss import HeadRows
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.model_provider import check_layout, context_length, family_of
from megakd.models.shapes import head_size
from megakd.models.weight_only import check_quantization
from megakd.reporting.own_folder import OwnFolder
from megakd.runtime.initialize import from_rank_zero, is_rank_zero, on_rank_zero, resolve_dtype
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.teachers.live import LiveTeacher
from megakd.teachers.quantised import quantised

MIB = 2**20
MICRO_BATCHES_PER_PASS = 8  # hidden states of a pass are kept; more fill the pipeline better
NO_RESPONSE = "a teacher's targets are of responses; give data that have them"
SAID = {  # what decides a field of the description, in words that a user has given
    "kind": "--cache-kind", "top_k": "--top-k", "dtype": "--dtype", "checksum": "--teacher-model", "quantize": "--teacher-quantize",
    "conditioning": "what the teacher reads", "vocab_size": "--model", "contents": "the data", "files": "--file-mib",
}  # fmt: skip


def cache_teacher(config: CacheConfig) -> None:
    """Write what is missing of `config.save`.

    Raises:
        UserError: something does not fit; before any weight is loaded where that can be known.
    """
    teacher = ModelFolder.open(config.teacher_model, flag="--teacher-model")
    student = ModelFolder.open(config.model) if config.model else None
    check(config, teacher, student)
    OwnFolder(Path(config.save), "cache_teacher.py").check()
    plan = Plan.of(config, teacher, student)
    plan.check_begun()
    layout = start(config.parallel)
    on_rank_zero(lambda: plan.begin(teacher))
    if missing := from_rank_zero(plan.missing):  # before the first of the replicas has written any
        options = align_vocabularies([teacher.config.vocab_size], layout.tp_size) | {"dtype": resolve_dtype(config.dtype)}
        model = frozen(load_model(teacher, layout, hidden_dropout=0.0, attention_dropout=0.0, **options))
        Writer(plan, teacher_of(model, config, plan), config.micro_batch_size).write(missing)
    dist.barrier()
    if is_rank_zero():
        print(f"{config.save}: {plan.summary()}; train with --teacher-cache {config.save}", flush=True)


def teacher_of(model: HiddenStateGPTModel, config: CacheConfig, plan: Plan) -> LiveTeacher:
    """The model, quantised where that is asked for; measured on the texts that come first."""
    if config.teacher_quantize == "none":
        return LiveTeacher(model)
    first = [dataset[i] for dataset, i in plan.texts[: config.micro_batch_size]]
    return quantised(model, config.teacher_quantize, first, config.micro_batch_size)


def check(config: CacheConfig, teacher: ModelFolder, student: ModelFolder | None) -> None:
    """The teacher against the layout, the lengths, --top-k and the student.

    Raises:
        UserError: the first thing that does not fit.
    """
    check_quantization(config.teacher_quantize)
    grid, _ = grids_of(config.parallel, AS_THE_STUDENT)
    check_layout(teacher.config, grid.tp_size, grid.pp_size, flag=teacher.flag, name=str(teacher.path))
    check_tokenizers(student or teacher, teacher)
    check_context(teacher, config.data.max_length, 0, f"--max-length {config.data.max_length}", "use --max-length {} or less")
    counted = vocab_size(teacher, student)
    if config.cache_kind == "topk" and config.top_k > counted:
        raise UserError(f"--top-k {config.top_k} is more than the {counted} token ids there are; use --cache-kind dense, or fewer")


def vocab_size(teacher: ModelFolder, student: ModelFolder | None) -> int:
    """Ids that count: those that both have."""
    return min(folder.config.vocab_size for folder in (teacher, student or teacher))


def open_texts(config: CacheConfig, teacher: ModelFolder, student: ModelFolder | None) -> list[Sequence[Sample]]:
    """The data files as training reads them.

    Raises:
        UserError: a file cannot be read, or a row has no response.
    """
    data, reader = config.data, student or teacher
    conditioning = Conditioning.open(
        config.conditioning,
        reader.tokenizer,
        teacher.tokenizer,
        template=data.prompt_template,
        positions=context_length(teacher.config),
    )
    paths = filter(None, (data.train_data, data.valid_data))
    return [open_responses(path, reader.tokenizer, data, conditioning=conditioning, no_response=NO_RESPONSE) for path in paths]


@dataclass(frozen=True)
class Plan:
    """What shall stand in the folder: which text in which file."""

    folder: Path
    description: Description
    texts: Sequence[tuple[Sequence[Sample], int]]  # data set and index, no two of one key
    keys: Sequence[bytes]
    rows: Sequence[int]  # supervised positions of each
    parts: Sequence[range]  # the texts of each file

    @classmethod
    def of(cls, config: CacheConfig, teacher: ModelFolder, student: ModelFolder | None) -> Plan:
        """
        Raises:
            UserError: the data cannot be used.
        """
        found = {}
        for dataset in open_texts(config, teacher, student):
            for i in range(len(dataset)):
                sample = dataset[i]
                found.setdefault(key_of(sample), (dataset, i, sample.num_labels))
        rows = [labels for _, _, labels in found.values()]
        dtype = str(resolve_dtype(config.dtype)).removeprefix("torch.")
        description = Description(
            kind=config.cache_kind,
            top_k=config.top_k if config.cache_kind == "topk" else None,
            dtype=dtype,
            vocab_size=vocab_size(teacher, student) if config.cache_kind == "topk" else teacher.config.vocab_size,
            hidden_size=head_size(family_of(teacher.config), teacher.config),
            teacher=config.teacher_model,
            checksum=checksum(model_files(Path(config.teacher_model)), whole=False),
            quantize=config.teacher_quantize,
            conditioning=asdict(config.conditioning),
            data={name: value for name, value in asdict(config.data).items() if name.endswith("_data") and value},
            texts=len(rows),
            rows=sum(rows),
            files=0,
            contents=hashlib.sha256(b"".join(found)).hexdigest(),
        )
        parts = list(cut(rows, config.file_mib * MIB // description.row_bytes))
        description = replace(description, files=len(parts))
        return cls(Path(config.save), description, [(data, i) for data, i, _ in found.values()], list(found), rows, parts)

    def check_begun(self) -> None:
        """What is there already was begun with the same.

        Raises:
            UserError: it was not; the message says what is another.
        """
        if not (self.folder / DESCRIPTION).is_file():
            return
        before = asdict(Description.read(self.folder, flag="--save"))
        for name, said in SAID.items():
            if before[name] != getattr(self.description, name):
                raise UserError(
                    f"--save {self.folder} was begun with another {said.removeprefix('the ')}; give the same command to go on with it, "
                    "or another --save"
                )

    def begin(self, teacher: ModelFolder) -> None:
        """On rank 0: tell what will be written, and write what says so.

        Raises:
            UserError: the disk has no room for it.
        """
        missing = self.missing()
        size = sum(self.rows[i] for number in missing for i in self.parts[number]) * self.description.row_bytes
        print(f"{self.folder}: {self.summary()}, of which {len(missing)} files ({size / MIB:,.1f} MiB) are to be written", flush=True)
        OwnFolder(self.folder, "cache_teacher.py").claim()
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise UserError(
                f"--save {self.folder}: {size / MIB:,.0f} MiB are to be written and {free / MIB:,.0f} are free; free some space, or store "
                "less with --cache-kind topk and a smaller --top-k"
            )
        copy_teacher(teacher, self.folder)
        self.description.write(self.folder)

    def missing(self) -> list[int]:
        """Numbers of the files that are not there."""
        head = self.description.kind == "hidden" and not (self.folder / HEAD).is_file()
        return [i for i in range(len(self.parts)) if head or not targets_file(self.folder, i).is_file()]

    def summary(self) -> str:
        """One line."""
        d = self.description
        size = d.rows * d.row_bytes / MIB
        what = f"{d.kind} of the {d.top_k} likeliest tokens" if d.top_k else d.kind
        return f"{d.texts:,} texts, {d.rows:,} positions × {d.row_bytes:,} bytes ({what}) = {size:,.1f} MiB in {d.files} files"

    def samples(self, number: int) -> list[Sample]:
        """The texts of a file, numbered."""
        places = enumerate(self.texts[i] for i in self.parts[number])
        return [replace(dataset[i], sample_id=place) for place, (dataset, i) in places]


def cut(rows: Sequence[int], most: int) -> Iterator[range]:
    """Neighbours of at most `most` rows together; one that is longer stands alone."""
    first, held = 0, 0
    for i, count in enumerate(rows):
        if i > first and held + count > most:
            yield range(first, i)
            first, held = i, 0
        held += count
    yield range(first, len(rows))


class Writer:
    """The teacher at work on this rank."""

    def __init__(self, plan: Plan, teacher: LiveTeacher, micro_batch_size: int):
        self.plan, self.teacher, self.micro_batch_size = plan, teacher, micro_batch_size
        self.layout: ParallelLayout = teacher.model.layout
        self.writes = self.layout.is_last_stage and self.layout.tp_rank == 0

    def write(self, missing: Sequence[int]) -> None:
        """The files of this replica, and the head."""
        if self.plan.description.kind == "hidden":
            self._write_head()
        mine = missing[self.layout.dp_rank :: self.layout.dp_size]
        for done, number in enumerate(mine, start=1):
            samples = self.plan.samples(number)
            tensors = self._targets(samples)
            if self.writes:
                part = self.plan.parts[number]
                write_targets(self.plan.folder, number, *(x[part.start : part.stop] for x in (self.plan.keys, self.plan.rows)), tensors)
                if self.layout.dp_rank == 0:
                    print(f"{targets_file(self.plan.folder, number).name} written, {done} of {len(mine)}", flush=True)

    def _write_head(self) -> None:
        if self.layout.is_last_stage:
            head_VH = gathered(self.teacher.model.output_weight().t().contiguous(), self.layout)[:, : self.plan.description.vocab_size].t()
            if self.writes and self.layout.dp_rank == 0:
                with file_errors(self.plan.folder):
                    write_tensors(self.plan.folder / HEAD, {"head": head_VH})

    def _targets(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """By name, text after text in their order; on the last stage."""
        found: dict[int, dict[str, Tensor]] = {}
        step = self.micro_batch_size * MICRO_BATCHES_PER_PASS
        for first in range(0, len(samples), step):
            batches = micro_batches(samples[first : first + step], self.micro_batch_size, device=self.layout.device)
            for batch, rows in zip(batches, self.teacher.read(batches, to=self.layout)):
                parts = {name: x.cpu().split(batch.response_lengths.tolist()) for name, x in self._of_rows(rows).items()}
                found |= {sample: {name: x[i] for name, x in parts.items()} for i, sample in enumerate(batch.sample_ids.tolist())}
        return {name: torch.cat([found[i][name] for i in range(len(samples))]) for name in found[0]} if found else {}

    @torch.no_grad()
    def _of_rows(self, rows: HeadRows) -> dict[str, Tensor]:
        if self.plan.description.kind == "hidden":
            return {"hidden": rows.hidden_NH}
        chunk = CPU_CHUNK_ROWS if self.layout.device.type == "cpu" else CHUNK_ROWS  # those of the losses: the same products, to the bit
        parts = [self._of_logits(torch.mm(hidden, rows.head_VpH.t())) for hidden in rows.hidden_NH.split(chunk)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _of_logits(self, logits_NVp: Tensor) -> dict[str, Tensor]:
        logits_NV = gathered(logits_NVp, self.layout)[:, : self.plan.description.vocab_size]
        return truncated(logits_NV, self.plan.description.top_k) if self.plan.description.kind == "topk" else {"logits": logits_NV}


def truncated(logits_NV: Tensor, k: int) -> dict[str, Tensor]:
    """The K likeliest tokens, the log of the others' mass (-inf where there are none), and of the least likely token."""
    log_p_NV = logits_NV.float().log_softmax(-1)
    kept_NK, ids_NK = log_p_NV.topk(k)
    rest_N = log_p_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    return {"ids": ids_NK.int(), "log_probs": kept_NK, "log_rest": rest_N, "log_min": log_p_NV.amin(-1)}


def gathered(columns_NVp: Tensor, layout: ParallelLayout) -> Tensor:
    """[N, V] on every tensor-parallel rank."""
    if layout.tp_size == 1:
        return columns_NVp
    shards = [torch.empty_like(columns_NVp) for _ in range(layout.tp_size)]
    dist.all_gather(shards, columns_NVp.contiguous(), group=layout.tp_group)
    return torch.cat(shards, 1)
