"""Which samples a rank sees at an iteration.

A pure function of (seed, iteration): there is no position to save, and a run resumes by asking for its next iteration.
Each epoch is a fresh permutation drawn from (seed, epoch). The global batch is the same whatever the number of data-parallel
ranks; it is dealt so that every rank has as many rows as another and about as many tokens.
"""

from collections.abc import Sequence

import numpy as np

from megakd.data.batch import Sample
from megakd.errors import UserError


class DataLoader:
    """Global batches of `global_batch_size` samples, and of each the share of `dp_rank`.

    Rows that do not fill a batch at an epoch's end are left out of that epoch.

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
    ) -> None:
        if global_batch_size > len(dataset):
            raise UserError(
                f"--global-batch-size {global_batch_size} is more than the {len(dataset)} rows of the data; "
                f"use at most {len(dataset)}"
            )
        if global_batch_size % dp_size:
            raise UserError(
                f"--global-batch-size {global_batch_size} is not divisible by the {dp_size} data-parallel ranks; "
                f"use a multiple of {dp_size}"
            )
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self._order_of: tuple[int, np.ndarray] | None = None  # the epoch last asked for, and its order

    @property
    def iterations_per_epoch(self) -> int:
        """Whole global batches in the data."""
        return len(self.dataset) // self.global_batch_size

    def samples(self, iteration: int) -> list[Sample]:
        """This rank's share of global batch `iteration`, which counts from 0."""
        return split_across_dp(self.global_samples(iteration), self.dp_size)[self.dp_rank]

    def global_samples(self, iteration: int) -> list[Sample]:
        """The whole global batch, the same on every rank."""
        epoch, batch = divmod(iteration, self.iterations_per_epoch)
        first = batch * self.global_batch_size
        return [self.dataset[int(i)] for i in self._order(epoch)[first : first + self.global_batch_size]]

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
