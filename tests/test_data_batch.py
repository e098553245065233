"""A Batch holds the labels and the mask of its samples, whatever the token values and whoever shares the row's batch."""

from dataclasses import replace

import pytest
import torch

from megakd.data.batch import Sample, batch_of, collate, collate_unshifted, cut_by_length, micro_batches

EOS = 9


def samples_of(*lengths: tuple[int, int]) -> list[Sample]:
    """Samples with prompts and responses of the given lengths; the response ends with EOS."""
    return [
        Sample(number, tuple(range(1, prompt + 1)), (*range(11, 10 + response), EOS))
        for number, (prompt, response) in enumerate(lengths)
    ]


def test_the_mask_starts_at_the_last_prompt_token_and_ends_with_the_label_eos():
    batch = collate([Sample(7, (1, 2, 3), (4, 5, EOS)), Sample(8, (1,), (EOS,))])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5], [1, 0, 0, 0, 0]]
    assert batch.labels.tolist() == [[2, 3, 4, 5, EOS], [EOS, 0, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert batch.lengths.tolist() == [5, 1]
    assert batch.sample_ids.tolist() == [7, 8]
    assert batch.num_supervised == 4


def test_eos_is_learnt_where_it_ends_a_response_even_if_padding_and_prompt_hold_the_same_id():
    pad = 0
    batch = collate([Sample(0, (pad, 5), (6, pad)), Sample(1, (5, 5, 5), (6, 6, 6, pad))])
    assert batch.loss_mask.tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]


def test_a_teachers_longer_prompt_moves_its_positions_and_keeps_the_labels_that_count():
    """In a frame of its own width, rows in the student's order, and label for label the same."""
    primed = Sample(7, (1, 2, 3), (4, 5, EOS), teacher_prompt=(8, 8, 1, 2, 3))
    batch = collate([primed, Sample(8, (1,), (6, EOS)), Sample(9, (1, 2), (7, EOS), teacher_prompt=(2,))])
    twin = batch.for_teacher
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5], [1, 6, 0, 0, 0], [1, 2, 7, 0, 0]]
    assert twin.tokens.tolist() == [[8, 8, 1, 2, 3, 4, 5], [1, 6, 0, 0, 0, 0, 0], [2, 7, 0, 0, 0, 0, 0]]
    assert twin.loss_mask.tolist() == [[0, 0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    for read in (batch, twin):
        assert read.supervised_labels.tolist() == [4, 5, EOS, 6, EOS, 7, EOS]
        assert (read.sample_ids.tolist(), read.response_lengths.tolist()) == ([7, 8, 9], [3, 2, 2])
    assert batch.to("cpu").for_teacher.tokens.tolist() == twin.tokens.tolist() and twin.for_teacher is twin


def test_places_are_compared_unshifted_where_the_published_code_does():
    """The question's beside the answer's, cut to the shortest of question, primed question and answer."""
    rows = [((1, 2, 3, 4), (5, 6, EOS), (8, 1, 2, 3, 4)), ((1, 2), (5, 6, 7, EOS), None), ((1, 2, 3, 4, 5), (6, 7, 8, EOS), (9,))]
    batch = collate_unshifted([Sample(i, x, y, teacher_prompt=z) for i, (x, y, z) in enumerate(rows)])
    assert batch.tokens.tolist() == [[1, 2, 3], [1, 2, 0], [1, 0, 0]]
    assert batch.for_teacher.tokens.tolist() == [[8, 1, 2], [1, 2, 0], [9, 0, 0]]
    assert batch.loss_mask.tolist() == batch.for_teacher.loss_mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch.supervised_labels.tolist() == [5, 6, EOS, 5, 6, 6]


def test_a_teacher_that_reads_the_same_has_no_batch_of_its_own():
    batch = collate(samples_of((3, 2)))
    assert batch.teacher_batch is None and batch.for_teacher is batch


def test_a_text_without_a_prompt_has_as_many_labels_for_a_teacher_that_reads_something_first():
    """The student predicts all but the first token, and so many rows the teacher gives, though it could predict that one too."""
    batch = collate([Sample(0, (), (3, 4, EOS), teacher_prompt=(8, 8))])
    assert batch.supervised_labels.tolist() == batch.for_teacher.supervised_labels.tolist() == [4, EOS]


def test_rows_of_like_length_share_a_micro_batch_whoever_reads_the_longer_one():
    short, long = Sample(0, (1,), (EOS,)), Sample(1, (1,), (EOS,), teacher_prompt=(1,) * 300)
    other = Sample(2, (1,) * 299, (EOS,))
    assert [batch.sample_ids.tolist() for batch in micro_batches([short, long, other], 2)] == [[1, 2], [0]]
    assert [batch.sample_ids.tolist() for batch in micro_batches([short, long, other], 3, most_tokens=500)] == [[1], [2], [0]]


def test_every_label_of_a_plain_text_counts():
    batch = collate([Sample(0, (), (3, 4, 5, EOS))])
    assert (batch.labels.tolist(), batch.loss_mask.tolist()) == ([[4, 5, EOS]], [[1, 1, 1]])


def test_a_prompt_without_a_response_has_no_label():
    batch = collate([Sample(0, (3, 4, 5), ())])
    assert (batch.tokens.tolist(), batch.num_supervised) == ([[3, 4]], 0)


def test_the_dtypes_are_those_of_embedding_and_loss():
    batch = collate(samples_of((3, 2), (5, 5)))
    assert {name: getattr(batch, name).dtype for name in ("tokens", "labels", "position_ids", "lengths", "sample_ids")} == {
        name: torch.int64 for name in ("tokens", "labels", "position_ids", "lengths", "sample_ids")
    }
    assert batch.loss_mask.dtype == torch.float32
    assert (batch.micro_batch_size, batch.seq_length) == (2, 9)
    assert batch.to("cpu").tokens.is_contiguous() and batch.labels.is_contiguous()


@pytest.mark.parametrize(("options", "width"), [({}, 9), ({"seq_length": 20}, 20)])
def test_the_width_is_the_longest_rows_or_as_asked(options, width):
    batch = collate(samples_of((3, 2), (5, 5)), **options)
    assert batch.seq_length == width
    assert batch.num_supervised == 7


def test_a_row_that_does_not_fit_names_the_flag():
    with pytest.raises(ValueError, match="--seq-length 8 is too short for a row of 9 positions"):
        collate(samples_of((5, 5)), seq_length=8)


def test_micro_batches_hold_every_sample_once_and_rows_of_like_length_share_one():
    samples = samples_of((3, 2), (9, 5), (1, 1), (8, 6), (3, 3), (2, 2))
    batches = micro_batches(samples, 2)
    assert [batch.sample_ids.tolist() for batch in batches] == [[1, 3], [4, 0], [5, 2]]
    assert [batch.seq_length for batch in batches] == [13, 5, 3]
    assert sum(batch.num_supervised for batch in batches) == collate(samples).num_supervised


def test_a_long_row_has_a_micro_batch_to_itself_where_padding_costs_more():
    assert cut_by_length([500, 110, 100, 90, 80], 4, cost=128) == [slice(0, 1), slice(1, 5)]
    assert cut_by_length([110, 100, 90, 80], 4, cost=128) == [slice(0, 4)]
    assert cut_by_length([500, 400], 4, cost=1024) == [slice(0, 2)]


def test_fewer_micro_batches_on_a_gpu_which_waits_for_launches():
    samples = samples_of((300, 5), (10, 5))
    assert [len(micro_batches(samples, 4, device=device)) for device in ("cpu", "meta")] == [2, 1]


def test_no_cut_into_micro_batches_is_cheaper():
    def cuts(first):
        yield from [[]] if first == len(lengths) else ([slice(first, n), *rest] for n in range(first + 1, min(first + 3, len(lengths)) + 1) for rest in cuts(n))

    def cost(groups):
        return sum((group.stop - group.start) * lengths[group.start] + 128 for group in groups)

    lengths = [400, 390, 210, 200, 190, 80, 70, 10]
    assert cost(cut_by_length(lengths, 3, cost=128)) == min(map(cost, cuts(0)))


def test_a_token_budget_limits_positions_and_a_longer_row_stands_alone():
    lengths = [400, 100, 100, 90, 30, 30]
    groups = cut_by_length(lengths, 6, most_tokens=200, cost=128)
    assert lengths[groups[0]] == [400] and sum(len(lengths[group]) for group in groups) == 6
    assert all((group.stop - group.start) * lengths[group.start] <= 200 for group in groups[1:])


@pytest.mark.parametrize("collated", [collate, collate_unshifted])
def test_a_batch_follows_from_its_essence(collated):
    batch = collated([replace(sample, teacher_prompt=(7, *sample.prompt)) for sample in samples_of((3, 4), (1, 6), (5, 1))])
    for part in (replace(batch, teacher_batch=None), batch.for_teacher):
        again = batch_of(*part.essence)
        essential = {name: value for name, value in vars(part).items() if name != "samples"}  # whoever asks for those has them
        for name, value in essential.items():
            assert torch.equal(getattr(again, name), value) if torch.is_tensor(value) else value is None, name
