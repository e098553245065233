"""--num-generations: every prompt is answered N times, read once, by draws of their own that know nothing of the layout."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from distributed import run_distributed
from stories import PAIRS
from test_generation import EOS, IDS, SAMPLED, VARIANTS, load, p_value, prompts
from test_methods import method_inputs, run_config
from tiny import tiny_folder

from megakd.config import Config, DataConfig, GenerationConfig, ModelConfig, OutputConfig, TrainingConfig
from megakd.data.batch import Sample
from megakd.data.dataloader import DataLoader
from megakd.errors import UserError
from megakd.generation.decoder import Decoder
from megakd.generation.generate import generate
from megakd.generation.mixture import MixtureComponent
from megakd.generation.sampling import Sampling
from megakd.methods import METHODS

N = 3
COPIED = [i for i in range(len(IDS)) for _ in range(N)]  # of each answer its prompt
NUMBERS = list(range(N)) * len(IDS)


@contextmanager
def counted_prompts():
    """How many each prefill reads."""
    read, prefill = [], Decoder.prefill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "prefill", lambda decoder, *_, **options: read.append(len(decoder.prompts)) or prefill(decoder, *_, **options))
        yield read


def answers_of(layout, folders, families):
    """N answers to each prompt, one at a time and together; by whom they are told apart; and how many prompt columns were read."""
    found = {}
    for family in families:
        model, teacher = load(layout, folders[family]), load(layout, folders["gpt2"])
        mixed = {"mix_with": [MixtureComponent(teacher, 0.4, prompts=[prompts()[-1 - i] for i in COPIED])]}
        many = partial(generate, model, [prompts()[i] for i in COPIED], [IDS[i] for i in COPIED], SAMPLED, eos_id=EOS, generations=NUMBERS)
        with counted_prompts() as read:
            found[family] = {"together": many(), "read": sum(read)}
        found[family] |= {"few at once": many(batch_size=4), "mixed": many(**mixed), "mixed, few at once": many(**mixed, batch_size=5)}
        one = [generate(model, prompts(), IDS, SAMPLED, eos_id=EOS, generations=[g] * len(IDS)) for g in range(N)]
        found[family] |= {"one at a time": [one[g][i] for i, g in zip(COPIED, NUMBERS)], "plain": generate(model, prompts(), IDS, SAMPLED, eos_id=EOS)}
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(root / name, **VARIANTS[name]) for name in ("gpt2", "llama", "mistral")}


@pytest.fixture(scope="module")
def first(folders):
    return run_distributed(answers_of, 1, folders, ["llama", "mistral"])[0]


def test_a_prompt_is_read_once_and_its_answers_are_those_of_prompts_read_alone(first):
    for found in first.values():
        assert found["read"] == len(IDS)
        assert found["together"] == found["few at once"] == found["one at a time"]
        assert found["mixed"] == found["mixed, few at once"] != found["together"]


def neighbours(layout, folders):
    """Two rows with one prompt, of which a teacher reads another beside each: together, and each alone."""
    model, teacher, prompt = load(layout, folders["llama"]), load(layout, folders["gpt2"]), [5, 6, 7]
    read = [[8, 9], [10, 11, 12, 13]]
    write = lambda rows: generate(
        model, [prompt] * len(rows), rows, SAMPLED, eos_id=EOS, mix_with=[MixtureComponent(teacher, 0.9, prompts=[read[i] for i in rows])]
    )
    return write([0, 1]), write([0]) + write([1])


def test_one_prompt_beside_which_others_are_read_is_not_read_once(folders):
    ((together, alone),) = run_distributed(neighbours, 1, folders)
    assert together == alone


def test_the_first_answer_is_the_one_of_a_run_without_and_the_others_differ(first):
    answers = first["llama"]["together"]
    assert answers[::N] == first["llama"]["plain"]
    assert all(len(set(map(tuple, answers[i : i + N]))) == N for i in range(0, len(answers), N))


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)])
def test_the_answers_are_the_same_on_every_layout(folders, first, tp, pp):
    for found in run_distributed(answers_of, tp * pp, folders, ["llama"], tp=tp, pp=pp):
        told = {name: answers for name, answers in found["llama"].items() if name != "read"}
        assert told == {name: answers for name, answers in first["llama"].items() if name != "read"}


def test_the_answers_follow_the_models_distribution(folders):
    """Each answer number on its own, and two of them together: they are independent."""

    def draw(layout):
        model, count = load(layout, folders["gpt2"]), 4000
        one = Sampling(max_new_tokens=1, seed=11, temperature=0.7, top_k=6)
        drawn = generate(model, [prompts()[0]] * 2 * count, [i for i in range(count) for _ in range(2)], one, eos_id=-1, generations=[0, 1] * count)
        logits = model(torch.tensor([prompts()[0]]), torch.arange(len(prompts()[0]))[None])[-1, 0] @ model.output_weight().t()
        return [token for (token,) in drawn], logits.detach()

    drawn, logits = run_distributed(draw, 1)[0]
    likeliest = (logits[:97] / 0.7).topk(6)
    p, count = likeliest.values.softmax(0), len(drawn) // 2
    tables = [(drawn[::2], p), (drawn[1::2], p)]
    for tokens, expected in tables:
        counts = Counter(tokens)
        assert p_value([(torch.tensor([float(counts[t]) for t in likeliest.indices.tolist()]), expected * count)]) > 1e-4
    pairs = Counter(zip(drawn[::2], drawn[1::2]))
    ids = likeliest.indices.tolist()
    together = torch.tensor([float(pairs[a, b]) for a in ids for b in ids])
    assert p_value([(together, torch.outer(p, p).flatten() * count)]) > 1e-4


# ---- batches


def dataset(size: int) -> list[Sample]:
    return [Sample(i, (1,) * (1 + i * 7 % 50), ()) for i in range(size)]


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_global_batch_is_its_prompts_each_n_times_side_by_side_on_one_rank(dp_size):
    loader = lambda rank, size: DataLoader(dataset(40), global_batch_size=24, seed=5, dp_rank=rank, dp_size=size, num_generations=3)
    plain = DataLoader(dataset(40), global_batch_size=8, seed=5)
    assert loader(0, 1).iterations_per_epoch == plain.iterations_per_epoch == 5
    for iteration in (0, 7):
        hands = [loader(rank, dp_size).samples(iteration) for rank in range(dp_size)]
        assert {len(hand) for hand in hands} == {24 // dp_size}
        for hand in hands:
            assert [sample.generation for sample in hand] == [0, 1, 2] * (8 // dp_size)
            assert all(len({s.sample_id for s in hand[i : i + 3]}) == 1 for i in range(0, len(hand), 3))
        rows = {sample.sample_id for hand in hands for sample in hand}
        assert rows == {sample.sample_id for sample in plain.samples(iteration)} and len(rows) == 8


def test_a_batch_that_replicas_cannot_share_in_whole_prompts_is_refused():
    with pytest.raises(UserError, match=r"--global-batch-size 12 is not divisible by the 2 data-parallel ranks × --num-generations 4; use a multiple of 8"):
        DataLoader(dataset(40), global_batch_size=12, seed=5, dp_size=2, num_generations=4)
    with pytest.raises(UserError, match=r"--global-batch-size 24 is more than the 5 rows of the data × --num-generations 4; use at most 20"):
        DataLoader(dataset(5), global_batch_size=24, seed=5, num_generations=4)


@pytest.mark.parametrize(
    "method, changes, message",
    [
        ("promptkd", {}, "--num-generations 3 does not divide --global-batch-size 8, which counts answers; use a divisor of it"),
        ("kd", {"kd": {"on_policy_ratio": 0.5}, "training": {"global_batch_size": 9}}, "--num-generations 3: of the data, which --on-policy-ratio 0.5 learns"),
        ("kd", {"training": {"global_batch_size": 9}}, "--num-generations 3: of the data, which --on-policy-ratio 0 learns"),
        ("seqkd", {"training": {"global_batch_size": 9}}, "--method seqkd has no use for --num-generations 3, a flag of kd, minillm, promptkd"),
    ],
)
def test_what_has_no_use_for_several_answers_is_refused_in_one_line(method, changes, message):
    config = Config(
        method=method, models=ModelConfig(model="m", teacher_model="t"), data=DataConfig(train_data="d"), output=OutputConfig(save="s"),
        training=TrainingConfig(train_iters=1, global_batch_size=8), generation=GenerationConfig(num_generations=3),
    )  # fmt: skip
    config = replace(config, **{group: replace(getattr(config, group), **values) for group, values in changes.items()})
    with pytest.raises(UserError, match=message) as refused:
        config.check()
    assert "\n" not in str(refused.value)


# ---- methods


def run_of(layout, method, numbers):
    """Two iterations: what was written by sample and answer, and the losses."""
    config = run_config(method, 2, {})
    generation = replace(config.generation, num_generations=numbers, max_new_tokens=6)
    config = replace(config, generation=generation, kd=replace(config.kd, on_policy_ratio=1.0), minillm=replace(config.minillm, num_rollouts=8, ppo_epochs=1, lm_coef=0.0))
    inputs = method_inputs(layout, config, PAIRS["gpt2"])
    rows = [Sample(i, tuple(range(3, 6 + i)), ()) for i in range(16)]
    loader = DataLoader(rows, global_batch_size=8, seed=3, dp_rank=layout.dp_rank, dp_size=layout.dp_size, num_generations=numbers)
    runner, told = METHODS[method](inputs, config, total_iters=4), []
    for iteration in (1, 2):
        metrics = runner.train_iteration(loader, iteration)
        written = {(s.sample_id, s.generation): s.response for s in runner.all_gather_samples(runner.rollouts)}
        told.append((written, {name: metrics[name] for name in ("loss/reverse_kl", "loss/total", "grad_norm") if name in metrics}))
    return told


@pytest.mark.parametrize("method", ["kd", "minillm", "promptkd"])
def test_a_method_learns_every_answer_at_every_layout(method):
    (expected,) = run_distributed(run_of, 1, method, 4)
    for written, _ in expected:
        assert len(written) == 8 and {number for _, number in written} == {0, 1, 2, 3}
        assert all(len({written[i, g] for g in range(4)}) > 1 for i, _ in written)
    for tp, pp, dp in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        for rank in run_distributed(run_of, tp * pp * dp, method, 4, tp=tp, pp=pp):
            for (written, losses), (same, close) in zip(rank, expected):
                assert written == same
                assert losses == pytest.approx(close, rel=2e-4)
    (alone,) = run_distributed(run_of, 1, method, 1)
    assert {number for _, number in alone[0][0]} == {0} and len(alone[0][0]) == 8
