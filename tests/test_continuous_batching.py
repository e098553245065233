"""A row that has ended is followed at once: what is said stays what rows say alone, and no place is empty while a row waits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from distributed import run_distributed
from test_generation import EOS, VARIANTS, EagerStep, load, soft_prompt
from tiny import tiny_folder

from megakd.generation import rows
from megakd.generation.decoder import Decoder
from megakd.generation.generate import generate
from megakd.generation.mixture import MixtureComponent
from megakd.generation.sampling import Sampling

COUNT, NEW = 14, 12
LONG = Sampling(max_new_tokens=NEW, seed=6)
KINDS = {
    "sampled": LONG,
    "no repeats": Sampling(max_new_tokens=NEW, seed=6, repetition_penalty=1.5, no_repeat_ngram_size=2),
    "tails cut": Sampling(max_new_tokens=NEW, seed=6, top_k=30, top_p=0.9),
}


def ragged() -> tuple[list[list[int]], list[int]]:
    """Prompts of many lengths, and the most that each is answered: so that a cache of one row's length is filled several times over."""
    generator = torch.Generator().manual_seed(8)
    draw = lambda low, high: torch.randint(low, high, (COUNT,), generator=generator).tolist()
    return [torch.randint(2, 90, (n,), generator=generator).tolist() for n in draw(1, 16)], draw(1, NEW + 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(root / name, **VARIANTS[name]) for name in ("gpt2", "llama", "mistral")}


def writer(layout, folders, family, **options):
    prompts, limits = ragged()
    model = load(layout, folders[family])
    return partial(generate, model, prompts, list(range(COUNT)), eos_id=EOS, limits=limits, **options), model


def check_followers(layout, folders, families):
    """By family and kind: what is said three at a time is what all say at once; returns that."""
    said = {}
    for family in families:
        write, model = writer(layout, folders, family)
        kinds = {name: partial(write, sampling=sampling) for name, sampling in (KINDS if family == "llama" else {"sampled": LONG}).items()}
        kinds["soft prompt"] = partial(write, sampling=LONG, soft_prompt=soft_prompt(model.embedding_size))
        if family == "llama":  # a teacher that reads other prompts, long where the student's are short
            teacher = MixtureComponent(load(layout, folders["gpt2"]), 0.4, soft_prompt(), prompts=ragged()[0][::-1])
            kinds["mixed"] = partial(write, sampling=LONG, mix_with=[teacher])
        for name, kind in kinds.items():
            said[family, name] = kind()
            assert kind(batch_size=3) == said[family, name], (family, name)
    return said


@pytest.fixture(scope="module")
def alone(folders):
    return run_distributed(check_followers, 1, folders, list(VARIANTS.keys() & folders.keys()))[0]


def test_rows_that_follow_others_say_what_they_say_alone(alone):
    lengths = {len(response) for response in alone["gpt2", "sampled"]}
    assert len(lengths) > 5, "rows that end together are followed together"


@pytest.mark.parametrize("tp, pp", [(1, 2), (2, 2)])
def test_rows_that_follow_others_say_the_same_on_every_layout(folders, alone, tp, pp):
    for said in run_distributed(check_followers, tp * pp, folders, ["llama"], tp=tp, pp=pp):
        assert said == {kind: alone[kind] for kind in said} and len(said) == 5


def rows_by_step(layout, folders, batch_size):
    write, _ = writer(layout, folders, "gpt2")
    counts, decode = [], Decoder.decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "decode", lambda decoder, tokens, *rest: counts.append(len(tokens)) or decode(decoder, tokens, *rest))
        responses = write(sampling=LONG, batch_size=batch_size)
    return counts, [len(response) for response in responses]


def rows_under_way(lengths: list[int], places: int) -> list[int]:
    """Of each step, where a row that has ended is followed at once: its first token comes from reading the prompt, the others from steps."""
    waiting, left, counts = list(lengths), [], []
    while waiting or left:
        joining, waiting = waiting[: places - len(left)], waiting[places - len(left) :]
        counts += [len(left)] if left else []
        left = [n for n in (*(n - 1 for n in left), *(length - 1 for length in joining)) if n]
    return counts


def test_no_place_is_empty_while_a_row_waits(folders):
    (counts, lengths), *_ = run_distributed(rows_by_step, 1, folders, 4)
    prompts, _ = ragged()
    in_turn = sorted(range(COUNT), key=lambda i: -len(prompts[i]))
    assert counts == rows_under_way([lengths[i] for i in in_turn], 4)
    assert sum(counts) == sum(lengths) - COUNT and 2 * len(counts) < sum(lengths)


def test_a_captured_step_is_that_of_the_rows_that_follow_as_well(folders):
    """Where tokens are looked at every few steps: rows that have ended hold places, those that follow take them, and few shapes are met."""

    def check(layout, family):
        write, model = writer(layout, folders, family)
        soft = {"soft_prompt": soft_prompt(model.embedding_size)}
        plain, with_soft, made = write(sampling=LONG), write(sampling=LONG, **soft), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "is_capturable", lambda device, sampling: True)
            patch.setattr(rows, "SYNC_EVERY", 3)
            patch.setattr(rows, "CapturedStep", lambda step, *inputs: made.append(len(inputs[0])) or EagerStep(step, *inputs))
            assert write(sampling=LONG, batch_size=8) == plain
            assert write(sampling=LONG, batch_size=8) == plain  # in the room of before
            assert write(sampling=LONG, batch_size=5, **soft) == with_soft
            patch.setattr(rows, "SYNC_EVERY", 1)  # a place is looked at while the row that is to have it has not read its prompt
            assert write(sampling=LONG, batch_size=8) == plain
        return made

    for pp, most in ((1, {8, 4, 2, 1, 5}), (2, {4, 2, 1, 3})):
        for made in run_distributed(check, pp, "gpt2" if pp == 1 else "llama", pp=pp):
            assert set(made) <= most, made


def test_a_group_is_as_wide_as_the_rows_that_will_follow(folders):
    """A long limit, and the teacher's longest prompt, are those of a row that waits: it has room, and its columns are read."""

    def check(layout):
        model, teacher = load(layout, folders["gpt2"]), load(layout, folders["llama"])
        prompts, limits = [[5] * 6, [6] * 4, [7] * 3, [8, 9]], [2, 3, 2, 30]
        read = [[4], [4, 5], [9] * 3, list(range(2, 27))]
        mixed = [MixtureComponent(teacher, 0.5, prompts=read)]
        write = partial(generate, model, prompts, range(4), Sampling(max_new_tokens=30, seed=2), eos_id=-1, limits=limits, mix_with=mixed)
        assert write(batch_size=1) == write(batch_size=2) == write()
        return [len(response) for response in write()]

    for pp in (1, 2):
        assert run_distributed(check, pp, pp=pp)[0] == [2, 3, 2, 30]
