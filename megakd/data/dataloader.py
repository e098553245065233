"""Which samples a rank sees at an iteration: rows of the data, each once or as often as its prompt is answered.

A pure function of (seed, iteration): there is no position to save, and a run resumes by asking for its next iteration.
Each epoch is a fresh permutation drawn from (seed, epoch). The global batch is the same whatever the number of data-parallel
ranks; it is dealt so that every rank has as many rows as another and about as many tokens.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megakd.data.batch import Sample
from megakd.errors import UserError


class DataLoader:
    """Global batches of `global_batch_size` samples, and of each the share of `dp_rank`.

    A row makes `num_generations` samples, neighbours on one rank, numbered by their `generation`. Rows that do not fill a batch at an
    epoch's end are left out of that epoch.

    Raises UserError where the batch does not fit the data set or the ranks.
    """

    def __init__(
        self,
        dataset: Sequence[Sample],
        *,
        global_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        num_generations: int = 1,
    ) -> None:
        most, answers = len(dataset) * num_generations, f" × --num-generations {num_generations}" if num_generations > 1 else ""
        if global_batch_size > most:
            raise UserError(
                f"--global-batch-size {global_batch_size} is more than the {len(dataset)} rows of the data{answers}; use at most {most}"
            )
        if global_batch_size % (dp_size * num_generations):
            raise UserError(
                f"--global-batch-size {global_batch_size} is not divisible by the {dp_size} data-parallel ranks{answers}; "
                f"use a multiple of {dp_size * num_generations}"
            )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.num_generations = num_generations
        self._order_of: tuple[int, np.ndarray] | None = None  # the epoch last asked for, and its order

    @property
    def iterations_per_epoch(self) -> int:
        """Whole global batches in the data."""
        return len(self.dataset) // self.rows_per_batch

    @property
    def rows_per_batch(self) -> int:
        """Of the data, in one global batch."""
        return self.global_batch_size // self.num_generations

    def samples(self, iteration: int) -> list[Sample]:
        """This rank's share of global batch `iteration`, which counts from 0."""
        return self._answered(split_across_dp(self._rows(iteration), self.dp_size)[self.dp_rank])

    def global_samples(self, iteration: int) -> list[Sample]:
        """The whole global batch, the same on every rank."""
        return self._answered(self._rows(iteration))

    def _answered(self, rows: Sequence[Sample]) -> list[Sample]:
        """Each as often as its prompt is answered."""
        return [replace(row, generation=i) if i else row for row in rows for i in range(self.num_generations)]

    def _rows(self, iteration: int) -> list[Sample]:
        epoch, batch = divmod(iteration, self.iterations_per_epoch)
        first = batch * self.rows_per_batch
        return [self.dataset[int(i)] for i in self._order(epoch)[first : first + self.rows_per_batch]]

    def _order(self, epoch: int) -> np.ndarray:
        if self._order_of is None or self._order_of[0] != epoch:
            self._order_of = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.dataset))
        return self._order_of[1]


def split_across_dp(samples: Sequence[Sample], ranks: int) -> list[list[Sample]]:
    """Equal shares of like total length: sorted by length, given to the ranks there and back again (0 1 2 2 1 0 0 1 ...)."""
    ordered = sorted(samples, key=lambda sample: -sample.num_positions)
    there_and_back = [*range(ranks), *reversed(range(ranks))]
    shares: list[list[Sample]] = [[] for _ in range(ranks)]
    for place, sample in enumerate(ordered):
        shares[there_and_back[place % (2 * ranks)]].append(sample)
    return shares
