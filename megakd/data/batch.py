"""Samples of token ids, and the right-padded Batch that every method, on-policy or not, hands to the models.

    ids        = prompt + response, n ids, the response ends with EOS            prompt a b c      response d e EOS
    tokens     = ids[:n-1]                                                       a b c d e
    labels     = ids[1:]                                                         b c d e EOS
    loss_mask  = 1 from position len(prompt)-1 to n-2                            0 0 1 1 1

The mask comes from lengths alone: GPT-2, OPT and Llama train with pad == EOS, so token values cannot tell a real EOS from
padding.

Where the teacher reads another text, a Sample has that prompt as well, and a Batch has a `teacher_batch`: the same rows in the same
order, of which the same labels count, of a width of its own. So the n-th row of either model is about the same token:

    prompt a b c      response d e EOS          student   a b c d e          mask 0 0 1 1 1
    teacher's prompt p q a b c                  teacher   p q a b c d e      mask 0 0 0 0 1 1 1

Packed, rows stand one behind the other and there is no padding; each begins again at position 0, and sees itself alone:

    rows  a b c d e | f g          tokens   a b c d e f g          position_ids   0 1 2 3 4 0 1          lengths   5 2
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MICRO_BATCH_COST, GPU_MICRO_BATCH_COST = 128, 1024  # positions of padding that are worth one more micro-batch, and its launches
ON_DEVICE = ("tokens", "labels", "loss_mask", "position_ids", "supervised_positions")  # of a Batch; the rest stays with the host
PADDING = 0  # any valid id: padded positions are masked out of attention and loss, whatever they hold


@dataclass(frozen=True)
class Sample:
    """One prompt and its response. A plain text has an empty prompt, a prompt yet to be answered an empty response."""

    sample_id: int  # index in its data set
    prompt: tuple[int, ...]
    response: tuple[int, ...]  # EOS included, unless truncated
    teacher_prompt: tuple[int, ...] | None = None  # what the teacher reads in the prompt's place; None: the prompt
    teacher: str = ""  # the name of the row's own, where there are several
    generation: int = 0  # which answer to its prompt, of --num-generations

    @property
    def num_positions(self) -> int:
        """Input positions: one less than the ids, because the last id is only ever a label."""
        return len(self.prompt) + len(self.response) - 1

    @property
    def num_labels(self) -> int:
        """Positions that count: those that predict a token of the response. A plain text's first token has nothing before it."""
        return len(self.response) - (not self.prompt)

    @property
    def for_teacher(self) -> "Sample":
        """The same response behind what the teacher reads."""
        return self if self.teacher_prompt is None else Sample(self.sample_id, self.teacher_prompt, self.response)

    @property
    def longest(self) -> int:
        """Input positions of whoever reads more."""
        return max(self.num_positions, self.for_teacher.num_positions)


@dataclass(frozen=True)
class Batch:
    """b rows of s positions, right-padded; or packed, in [1, s] of everything that is [b, s] here."""

    tokens: Tensor  # [b, s] int64, inputs
    labels: Tensor  # [b, s] int64, the next token; 0 where there is none
    loss_mask: Tensor  # [b, s] float32, 1 where the label is a token of the response, EOS included
    position_ids: Tensor  # [b, s] int64, from 0 in every row
    supervised_positions: Tensor  # [n] int64, where the mask is 1 in the flattened [b * s]
    lengths: Tensor  # [b] int64, real input positions; like the two below always on the host, which asks for them
    response_lengths: Tensor  # [b] int64, labels that count
    sample_ids: Tensor  # [b] int64
    teacher_batch: "Batch | None" = None  # where the teacher reads another text
    samples: tuple[Sample, ...] = ()  # what the rows were made of, to whoever looks them up

    @property
    def for_teacher(self) -> "Batch":
        """The same rows as the teacher reads them: as many labels count, and they come in the same order."""
        return self if self.teacher_batch is None else self.teacher_batch

    @property
    def teacher(self) -> str:
        """The name of the one that all rows have."""
        return self.samples[0].teacher if self.samples else ""

    @property
    def micro_batch_size(self) -> int:
        """Rows, b."""
        return len(self.lengths)

    @property
    def packed_lengths(self) -> tuple[int, ...] | None:
        """Positions of each row where they stand one behind the other; None where each has a row of `tokens`."""
        return tuple(self.lengths.tolist()) if len(self.tokens) < len(self.lengths) else None

    @property
    def seq_length(self) -> int:
        """Positions of a row, s, padding included; packed, of all rows."""
        return self.tokens.shape[1]

    @property
    def num_supervised(self) -> int:
        """Labels that count, n; known without waiting for the device."""
        return self.supervised_positions.shape[0]

    @property
    def supervised_labels(self) -> Tensor:
        """The labels that count, row by row: [n]."""
        return self.labels.reshape(-1)[self.supervised_positions]

    @property
    def counts(self) -> Tensor:
        """[3]: labels that count, real input positions, positions computed on (padding included)."""
        return torch.tensor([self.num_supervised, int(self.lengths.sum()), self.tokens.numel()])

    @property
    def essence(self) -> tuple[Tensor, ...]:
        """What all of it but the teacher's batch follows from (`batch_of`), on the host, ids in 32 bits: what travels between ranks."""
        return self.tokens.int().cpu(), self.labels.int().cpu(), self.lengths, self.response_lengths, self.sample_ids

    def to(self, device: torch.device | str) -> "Batch":
        """What models and losses compute with on `device`, which is not waited for."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ON_DEVICE}
        return replace(self, **moved, teacher_batch=self.teacher_batch and self.teacher_batch.to(device))


def collate(samples: Sequence[Sample], *, seq_length: int | None = None) -> Batch:
    """One Batch of all samples, as wide as the longest row, or exactly `seq_length`; where a sample has a prompt for the teacher, with a
    `teacher_batch` that is as wide as that needs.

    Raises ValueError where a row does not fit into `seq_length`.
    """
    longest = max(sample.num_positions for sample in samples)
    if seq_length is not None and longest > seq_length:
        raise ValueError(f"--seq-length {seq_length} is too short for a row of {longest} positions; raise it to {longest}")
    labels, width = [sample.num_labels for sample in samples], seq_length or longest
    batch = padded(samples, labels, width)
    if all(sample.teacher_prompt is None for sample in samples):
        return replace(batch, samples=tuple(samples))
    as_read = [sample.for_teacher for sample in samples]
    teacher_batch = padded(as_read, labels, max(sample.num_positions for sample in as_read))
    return replace(batch, teacher_batch=teacher_batch, samples=tuple(samples))


def padded(samples: Sequence[Sample], labels: Sequence[int], width: int) -> Batch:
    """Rows of `width` positions; of each as many labels count as `labels` says, its last ones."""
    lengths = torch.tensor([sample.num_positions for sample in samples])
    ids = torch.full((len(samples), width + 1), PADDING)
    for row, sample in zip(ids, samples):
        row[: sample.num_positions + 1] = torch.tensor(sample.prompt + sample.response)

    sample_ids = torch.tensor([sample.sample_id for sample in samples])
    return batch_of(ids[:, :-1], ids[:, 1:].contiguous(), lengths, torch.tensor(labels), sample_ids)


def batch_of(tokens: Tensor, labels: Tensor, lengths: Tensor, response_lengths: Tensor, sample_ids: Tensor) -> Batch:
    """A Batch from its `essence`, whatever stands behind a row's end; the last `response_lengths` labels of a row count."""
    if len(tokens) < len(lengths):  # packed
        position_ids = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
        ends, counted = (x.repeat_interleave(lengths)[None] for x in (lengths, response_lengths))
    else:
        position_ids = torch.arange(tokens.shape[1]).expand(len(tokens), -1).contiguous()
        ends, counted = lengths[:, None], response_lengths[:, None]
    real = position_ids < ends
    loss_mask = real & (position_ids >= ends - counted)
    return Batch(
        tokens=tokens.where(real, PADDING).long(),  # the last id is a label only
        labels=labels.long(),
        loss_mask=loss_mask.float(),
        position_ids=position_ids,
        lengths=lengths,
        response_lengths=response_lengths,
        sample_ids=sample_ids,
        supervised_positions=loss_mask.flatten().nonzero().squeeze(1),
    )


def packed(batch: Batch) -> Batch:
    """The same rows without padding, and the teacher's as well. One row alone is as it was, cut to its length."""
    real = batch.position_ids < batch.lengths[:, None]
    tokens, labels = (x[real][None] for x in (batch.tokens, batch.labels))
    teacher_batch = batch.teacher_batch and packed(batch.teacher_batch)
    rows = batch_of(tokens, labels, batch.lengths, batch.response_lengths, batch.sample_ids)
    return replace(rows, teacher_batch=teacher_batch, samples=batch.samples)


def collate_unshifted(samples: Sequence[Sample]) -> Batch:
    """Place i of the prompt beside token i of the response, all cut to the shortest of prompt, teacher's prompt and response: what the
    published code of response priming compares, where no model has read what it is asked for. Every place counts."""
    sizes = [min(len(sample.prompt), len(sample.for_teacher.prompt), len(sample.response)) for sample in samples]
    labels = torch.full((len(samples), max(sizes)), PADDING)
    for row, sample, size in zip(labels, samples, sizes):
        row[:size] = torch.tensor(sample.response[:size])
    read = ([replace(who, prompt=who.prompt[:size], response=who.response[:1]) for who, size in zip(part, sizes)]
            for part in (samples, [sample.for_teacher for sample in samples]))  # fmt: skip
    student, teacher = (replace(padded(part, sizes, max(sizes)), labels=labels) for part in read)
    return replace(student, teacher_batch=teacher)


def micro_batches(
    samples: Sequence[Sample],
    micro_batch_size: int,
    *,
    most_tokens: int | None = None,
    pack: bool = False,
    device: torch.device | str = "cpu",
    collate: Callable[[Sequence[Sample]], Batch] = collate,
) -> list[Batch]:
    """Batches on `device` of at most `micro_batch_size` rows of like length and of one teacher, each as wide as its own longest row; or
    packed, of rows of any length.

    `most_tokens` limits the positions of a batch as well, padding included; a row that is longer stands alone. A row is as long as it is
    to whoever reads more of it, the student or the teacher.

    Longest first, so that memory that does not suffice shows in the first micro-batch; of several teachers one after the other. The
    order depends on `samples` alone.
    """
    device = torch.device(device)
    cost = MICRO_BATCH_COST if device.type == "cpu" else GPU_MICRO_BATCH_COST
    groups = [[sample for sample in samples if sample.teacher == name] for name in sorted({sample.teacher for sample in samples})]
    if pack:
        parts = [part for group in groups for part in first_fit(longest_first(group), micro_batch_size, most_tokens)]
        return [packed(collate(part)).to(device) for part in parts]
    parts = [part for group in groups for part in parted(group, micro_batch_size, most_tokens, cost=cost)]
    return [collate(part).to(device) for part in parts]


def longest_first(samples: Sequence[Sample]) -> list[Sample]:
    """As whoever reads more of each finds them."""
    return sorted(samples, key=lambda sample: -sample.longest)


def parted(samples: Sequence[Sample], most: int, most_tokens: int | None, *, cost: int) -> list[Sequence[Sample]]:
    """The rows of each micro-batch of one teacher."""
    ordered = longest_first(samples)
    return [ordered[part] for part in cut_by_length([sample.longest for sample in ordered], most, most_tokens, cost=cost)]


def first_fit(ordered: Sequence[Sample], most: int, most_tokens: int | None) -> list[list[Sample]]:
    """Few groups of at most `most` rows and `most_tokens` positions: each row goes to the first that has room for it (first-fit
    decreasing). A row that is longer stands alone."""
    groups: list[list[Sample]] = []
    room: list[float] = []
    for sample in ordered:
        fits = (i for i, group in enumerate(groups) if len(group) < most and sample.longest <= room[i])
        i = next(fits, len(groups))
        if i == len(groups):
            groups.append([])
            room.append(math.inf if most_tokens is None else most_tokens)
        groups[i].append(sample)
        room[i] -= sample.longest
    return groups


def cut_by_length(lengths: Sequence[int], most: int, most_tokens: int | None = None, *, cost: int) -> list[slice]:
    """Groups of at most `most` neighbours and `most_tokens` positions, with the fewest computed positions.

    `lengths` fall, and a group is as wide as its first.

    A group costs as much as `cost` positions, so that few are made and rows of unlike length still part.
    """
    total, start = [0.0], [0]  # of the best cut of the first n rows: its cost, and where its last group starts
    for stop in range(1, len(lengths) + 1):
        sizes = {lo: (stop - lo) * lengths[lo] for lo in range(max(0, stop - most), stop)}
        fits = {lo: size for lo, size in sizes.items() if most_tokens is None or size <= most_tokens or lo == stop - 1}
        best, first = min((total[lo] + size + cost, lo) for lo, size in fits.items())
        total.append(best)
        start.append(first)
    groups, stop = [], len(lengths)
    while stop:
        groups.append(slice(start[stop], stop))
        stop = start[stop]
    return groups[::-1]
