"""The global batch is a function of (seed, iteration), the same for every number of data-parallel ranks."""

import pytest

from megakd.data.batch import Sample
from megakd.data.dataloader import DataLoader


def dataset(size: int) -> list[Sample]:
    return [Sample(i, (1,) * (1 + i * 7 % 50), (2,) * (1 + i * 13 % 90)) for i in range(size)]


def ids(samples: list[Sample]) -> list[int]:
    return sorted(sample.sample_id for sample in samples)


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_the_ranks_share_the_same_global_batch_in_equal_and_balanced_hands(dp_size):
    data = dataset(100)
    hands = [
        DataLoader(data, global_batch_size=32, seed=5, dp_rank=rank, dp_size=dp_size).samples(4) for rank in range(dp_size)
    ]
    assert ids([sample for hand in hands for sample in hand]) == ids(DataLoader(data, global_batch_size=32, seed=5).samples(4))
    assert {len(hand) for hand in hands} == {32 // dp_size}
    totals = [sum(sample.num_positions for sample in hand) for hand in hands]
    assert max(totals) <= 1.2 * min(totals)


def test_an_epoch_reads_every_row_once_and_the_next_in_another_order():
    loader = DataLoader(dataset(60), global_batch_size=20, seed=5)
    assert loader.iterations_per_epoch == 3
    epochs = [[ids(loader.samples(3 * epoch + i)) for i in range(3)] for epoch in range(2)]
    assert [sorted(i for batch in epoch for i in batch) for epoch in epochs] == [list(range(60))] * 2
    assert epochs[0] != epochs[1]


def test_a_resumed_loader_goes_on_where_the_first_one_stopped():
    first = DataLoader(dataset(50), global_batch_size=16, seed=5)
    seen = [first.samples(iteration) for iteration in range(7)]
    assert DataLoader(dataset(50), global_batch_size=16, seed=5).samples(6) == seen[6]
    assert first.samples(2) == seen[2]  # nor does going back matter
    assert DataLoader(dataset(50), global_batch_size=16, seed=6).samples(6) != seen[6]


def test_a_batch_larger_than_the_data_names_the_flag_and_the_largest_that_works():
    with pytest.raises(ValueError, match="--global-batch-size 64 is more than the 50 rows of the data; use at most 50"):
        DataLoader(dataset(50), global_batch_size=64, seed=5)


def test_a_batch_that_the_ranks_cannot_share_names_the_flag_and_a_way_out():
    with pytest.raises(ValueError, match="--global-batch-size 30 is not divisible by the 4 data-parallel ranks; use a multiple"):
        DataLoader(dataset(50), global_batch_size=30, seed=5, dp_size=4)
