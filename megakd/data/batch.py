"""Samples of token ids, and the right-padded Batch that every method, on-policy or not, hands to the models.

    ids        = prompt + response, n ids, the response ends with EOS            prompt a b c      response d e EOS
    tokens     = ids[:n-1]                                                       a b c d e
    labels     = ids[1:]                                                         b c d e EOS
    loss_mask  = 1 from position len(prompt)-1 to n-2                            0 0 1 1 1

The mask comes from lengths alone: GPT-2, OPT and Llama train with pad == EOS, so token values cannot tell a real EOS from
padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MICRO_BATCH_COST = 128  # positions of padding that are worth one more micro-batch
ON_DEVICE = ("tokens", "labels", "loss_mask", "position_ids", "supervised_positions")  # of a Batch; the rest stays with the host
PADDING = 0  # any valid id: padded positions are masked out of attention and loss, whatever they hold


@dataclass(frozen=True)
class Sample:
    """One prompt and its response. A plain text has an empty prompt, a prompt yet to be answered an empty response."""

    sample_id: int  # index in its data set
    prompt: tuple[int, ...]
    response: tuple[int, ...]  # EOS included, unless truncated

    @property
    def num_positions(self) -> int:
        """Input positions: one less than the ids, because the last id is only ever a label."""
        return len(self.prompt) + len(self.response) - 1


@dataclass(frozen=True)
class Batch:
    """b rows of s positions, right-padded."""

    tokens: Tensor  # [b, s] int64, inputs
    labels: Tensor  # [b, s] int64, the next token; 0 where there is none
    loss_mask: Tensor  # [b, s] float32, 1 where the label is a token of the response, EOS included
    position_ids: Tensor  # [b, s] int64, 0 .. s-1 in every row
    supervised_positions: Tensor  # [n] int64, where the mask is 1 in the flattened [b * s]
    lengths: Tensor  # [b] int64, real input positions; like the two below always on the host, which asks for them
    response_lengths: Tensor  # [b] int64, labels that count
    sample_ids: Tensor  # [b] int64

    @property
    def micro_batch_size(self) -> int:
        """Rows, b."""
        return self.tokens.shape[0]

    @property
    def seq_length(self) -> int:
        """Positions of a row, s, padding included."""
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

    def to(self, device: torch.device | str) -> "Batch":
        """What models and losses compute with on `device`, which is not waited for."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in ON_DEVICE})


def collate(samples: Sequence[Sample], *, seq_length: int | None = None, multiple_of: int = 1) -> Batch:
    """One Batch of all samples, as wide as the longest row rounded up to `multiple_of`, or exactly `seq_length`.

    Raises ValueError where a row does not fit into `seq_length`.
    """
    lengths = torch.tensor([sample.num_positions for sample in samples])
    longest = int(lengths.max())
    if seq_length is not None and longest > seq_length:
        raise ValueError(f"--seq-length {seq_length} is too short for a row of {longest} positions; raise it to {longest}")
    width = seq_length or -(-longest // multiple_of) * multiple_of

    ids = torch.full((len(samples), width + 1), PADDING)
    for row, sample in zip(ids, samples):
        row[: sample.num_positions + 1] = torch.tensor(sample.prompt + sample.response)

    position_ids = torch.arange(width).expand(len(samples), width).contiguous()
    first_label = torch.tensor([max(len(sample.prompt) - 1, 0) for sample in samples])
    real = position_ids < lengths[:, None]
    loss_mask = real & (position_ids >= first_label[:, None])
    return Batch(
        tokens=ids[:, :-1].where(real, PADDING),  # the last id is a label only
        labels=ids[:, 1:].contiguous(),
        loss_mask=loss_mask.float(),
        position_ids=position_ids,
        lengths=lengths,
        response_lengths=loss_mask.sum(1),
        sample_ids=torch.tensor([sample.sample_id for sample in samples]),
        supervised_positions=loss_mask.flatten().nonzero().squeeze(1),
    )


def micro_batches(
    samples: Sequence[Sample], micro_batch_size: int, *, most_tokens: int | None = None, multiple_of: int = 1
) -> list[Batch]:
    """Batches of at most `micro_batch_size` rows of like length, each as wide as its own longest row.

    `most_tokens` limits the positions of a batch as well, padding included; a row that is longer stands alone.

    Longest first, so that memory that does not suffice shows in the first micro-batch. The order depends on `samples` alone.
    """
    ordered = sorted(samples, key=lambda sample: -sample.num_positions)
    parts = cut_by_length([sample.num_positions for sample in ordered], micro_batch_size, most_tokens)
    return [collate(ordered[part], multiple_of=multiple_of) for part in parts]


def cut_by_length(lengths: Sequence[int], most: int, most_tokens: int | None = None) -> list[slice]:
    """Groups of at most `most` neighbours and `most_tokens` positions, with the fewest computed positions.

    `lengths` fall, and a group is as wide as its first.

    A group costs as much as `MICRO_BATCH_COST` positions, so that few are made and rows of unlike length still part.
    """
    cost, start = [0.0], [0]  # of the best cut of the first n rows: its cost, and where its last group starts
    for stop in range(1, len(lengths) + 1):
        sizes = {lo: (stop - lo) * lengths[lo] for lo in range(max(0, stop - most), stop)}
        fits = {lo: size for lo, size in sizes.items() if most_tokens is None or size <= most_tokens or lo == stop - 1}
        best, first = min((cost[lo] + size + MICRO_BATCH_COST, lo) for lo, size in fits.items())
        cost.append(best)
        start.append(first)
    groups, stop = [], len(lengths)
    while stop:
        groups.append(slice(start[stop], stop))
        stop = start[stop]
    return groups[::-1]
