"""Greedy tokens are those of transformers, samples follow the softmax; both are the same on every layout and in every batch."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from distributed import run_distributed
from megakd_kernels import VocabShard
from tiny import tiny_config, tiny_folder, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.config import Config
from megakd.data.batch import Sample
from megakd.data.end_ids import EndIds
from megakd.generation import room, rows, sampling
from megakd.generation.decoder import slices_of_like_length
from megakd.generation.generate import generate
from megakd.generation.mixture import MixtureComponent
from megakd.generation.sampling import Sampler, Sampling, gumbel, noise_streams, uniform31
from megakd.methods.rollout import rollout
from megakd.models.hf_checkpoint import HFCheckpoint
from megakd.models.model_provider import build_model, load_weights, padded_vocab_size

VARIANTS = {
    "gpt2": {"family": "gpt2", "layers": 3},  # three layers: an uneven split over two stages
    "opt": {"family": "opt"},
    "opt-350m": {"family": "opt", "layers": 3, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "llama": {"family": "llama"},
    "llama, one key/value head": {"family": "llama", "num_key_value_heads": 1, "layers": 3},
    "qwen2": {"family": "qwen2", "layers": 2},
    "qwen3": {
        "family": "qwen3", "layers": 2, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8},
    },
    "mistral": {"family": "mistral", "layers": 2, "sliding_window": 6},
    "qwen3-moe": {"family": "qwen3_moe", "layers": 2},
    "gemma3": {"family": "gemma3_text", "layers": 3, "num_key_value_heads": 1},
    "smollm3": {"family": "smollm3", "layers": 3, "no_rope_layers": [1, 0, 0], "use_sliding_window": True, "sliding_window": 4, "num_key_value_heads": 1},
}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]  # tp, pp
ONCE = {  # usually each variant is cut alone in one of the two ways, as the last layout cuts all in both; these have what a cut could miss: heads that do
    (2, 1): {"gpt2", "llama", "llama, one key/value head", "qwen2", "qwen3", "gemma3", "qwen3-moe"},  # not divide, biases, norms of heads, experts;
    (1, 2): {"llama", "opt", "opt-350m", "mistral", "smollm3"},  # projections at the ends, and layers that are not alike
}
CASES = [
    pytest.param(layout, name, marks=() if name in ONCE.get(layout, VARIANTS) else pytest.mark.slow, id=f"{name}-TP{layout[0]} PP{layout[1]}")
    for layout in LAYOUTS for name in VARIANTS
]  # fmt: skip
LENGTHS = (5, 17, 9, 12, 3, 8, 8)
IDS = [31, 7, 12, 3, 44, 5, 6]
NEW = 10
EOS = 0
GREEDY, SAMPLED = Sampling(max_new_tokens=NEW, greedy=True), Sampling(max_new_tokens=NEW, seed=5)
TAILS_CUT = Sampling(max_new_tokens=NEW, temperature=1.3, top_k=20, top_p=0.9)
NO_REPEATS = Sampling(max_new_tokens=NEW, greedy=True, repetition_penalty=1.7, no_repeat_ngram_size=2)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 90, (length,), generator=generator).tolist() for length in LENGTHS]


def soft_prompt(hidden: int = 64) -> Tensor:
    return torch.randn(3, hidden, generator=torch.Generator().manual_seed(11)) * 0.1


def load(layout, folder, **overrides):
    source = HFCheckpoint(folder)
    width = padded_vocab_size([source.config.vocab_size], layout.tp_size)
    model = build_model(source.config, layout, padded_vocab_size=width, **overrides)
    load_weights(model, source)
    return model


def every_kind(layout, folders, teacher):
    """Responses by variant and kind, from models as training has them: sequence parallel, in train mode, with dropout."""
    responses = {}
    for name, folder in folders.items():
        model = load(layout, folder, sequence_parallel=True, hidden_dropout=0.3, attention_dropout=0.3).train()
        run = partial(generate, model, prompts(), IDS, eos_id=EOS)
        responses[name] = {
            "greedy": run(GREEDY),
            "soft prompt": run(GREEDY, soft_prompt=soft_prompt(model.embedding_size)),
            "limits": run(GREEDY, limits=range(1, len(LENGTHS) + 1)),
            "sampled": run(SAMPLED),
            "in threes": run(SAMPLED, batch_size=3),
        }
        if name == "llama":
            responses[name] |= more_kinds(run, teacher=load(layout, teacher))
            responses[name]["backwards"] = generate(model, prompts()[::-1], IDS[::-1], SAMPLED, eos_id=EOS)[::-1]
        assert model.training and model.config.sequence_parallel == (layout.tp_size > 1)
    return responses


def more_kinds(run, teacher):
    return {
        "no repeats": run(NO_REPEATS),
        "one by one": run(SAMPLED, batch_size=1),
        "tails cut": run(TAILS_CUT),
        "mixed": run(SAMPLED, mix_with=[MixtureComponent(teacher, 0.4, soft_prompt())]),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(root / name.replace("/", "-"), **spec) for name, spec in VARIANTS.items()}


@pytest.fixture(scope="module")
def responses(folders):
    """Of a layout, on every rank: of the usual variants, or of those that are slow there."""

    @cache
    def written(layout, slow=False):
        (tp, pp), usual = layout, ONCE.get(layout, VARIANTS)
        asked = {name: folder for name, folder in folders.items() if (name in usual) != slow}
        return run_distributed(every_kind, tp * pp, asked, folders["gpt2"], tp=tp, pp=pp)

    return lambda layout, name="llama": [rank[name] for rank in written(layout, name not in ONCE.get(layout, VARIANTS))]


@cache
def transformers_responses(folder, soft: bool = False, **settings) -> list[list[int]]:
    """Prompt by prompt, without padding."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for prompt in prompts():
        given = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        if soft:
            words = model.get_input_embeddings()(given["input_ids"][0])
            embedded = torch.cat([soft_prompt(words.shape[1]), words])[None]
            given = {"inputs_embeds": embedded, "attention_mask": torch.ones(1, embedded.shape[1], dtype=torch.long)}
        out = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=1, eos_token_id=EOS, **settings)[0]
        found.append(out.tolist() if soft else out[len(prompt) :].tolist())
    return found


@pytest.mark.parametrize("layout, name", CASES)
def test_greedy_tokens_are_those_of_transformers(folders, responses, name, layout):
    plain = transformers_responses(folders[name])
    assert len({token for response in plain for token in response}) > 4, "a model that says one thing shows little"
    for rank in responses(layout, name):
        assert rank["greedy"] == plain
        assert rank["limits"] == [response[: i + 1] for i, response in enumerate(plain)]
        assert rank["soft prompt"] == transformers_responses(folders[name], soft=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repetition_limits_are_those_of_transformers(folders, responses, layout):
    expected = transformers_responses(folders["llama"], repetition_penalty=1.7, no_repeat_ngram_size=2)
    assert expected != transformers_responses(folders["llama"])
    assert all(rank["no repeats"] == expected for rank in responses(layout))


@pytest.mark.parametrize("layout, name", CASES)
def test_sampled_tokens_are_the_same_on_every_layout_in_every_batch_and_order(responses, name, layout):
    first = responses((1, 1), name)[0]
    assert first["sampled"] != first["greedy"]
    for rank in responses(layout, name):
        assert rank["sampled"] == rank["in threes"] == first["sampled"]
        if name == "llama":
            assert rank["one by one"] == rank["backwards"] == first["sampled"]
            assert (rank["tails cut"], rank["mixed"]) == (first["tails cut"], first["mixed"])


def replica_responses(layout, folder):
    """Replicas with unlike numbers of prompts, the last with none."""
    share = slice(0, 6) if layout.dp_rank == 0 else slice(6, 7) if layout.dp_rank == 1 else slice(7, 7)
    return generate(load(layout, folder), prompts()[share], IDS[share], SAMPLED, eos_id=EOS)


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_sample_what_one_rank_samples(folders, responses, replicas):
    parts = run_distributed(replica_responses, replicas, folders["llama"])
    assert [response for part in parts for response in part] == responses((1, 1))[0]["sampled"]


def test_rows_that_end_early_leave_the_batch(folders):
    """With the likeliest token as EOS rows end at many lengths; those that go on are not disturbed."""

    def check(layout):
        model = load(layout, folders["gpt2"])
        long = Sampling(max_new_tokens=40, seed=2)
        endless = generate(model, prompts() * 5, range(35), long, eos_id=-1)
        tokens = torch.tensor(endless).flatten()
        eos = tokens.mode().values.item()
        ended = generate(model, prompts() * 5, range(35), long, eos_id=eos)
        assert ended == [response[: response.index(eos) + 1] if eos in response else response for response in endless]
        return len({len(response) for response in ended})

    for pp in (1, 2):
        assert run_distributed(check, pp, pp=pp)[0] > 8


class EagerStep:
    """Stands for CapturedStep where there is no GPU: the same fixed inputs and outputs, computed anew."""

    def __init__(self, step, *inputs):
        self.step, self.inputs = step, [x.clone() for x in inputs]
        self.outputs = step(*self.inputs)

    def __call__(self, *inputs):
        for fixed, new in zip(self.inputs, inputs):
            fixed.copy_(new)
        for fixed, new in zip(self.outputs, self.step(*self.inputs)):
            fixed.copy_(new)
        return self.outputs


def test_the_step_of_fixed_shape_gives_the_same_tokens(folders, monkeypatch):
    """What a GPU captures, run without capture: whole cache, rows that leave by halves, one of them at the end of its context."""

    def check(layout, limits):
        model, teacher = load(layout, folders["gpt2"]), load(layout, folders["llama"])
        read = [*prompts()[::-1], [3, 4]]  # by the teacher, the short ones where the student's are long
        options = {"mix_with": [MixtureComponent(teacher, 0.4, soft_prompt(), prompts=read)], "limits": limits}
        given = [*prompts(), list(range(2, 62))], [*IDS, 1], Sampling(max_new_tokens=30)
        never = generate(model, *given, eos_id=-1, **options)
        eos = never[0][10]  # a token that ends some rows between two fetches, and the first of them early
        expected = generate(model, *given, eos_id=eos, **options)
        monkeypatch.setattr(rows, "is_capturable", lambda device, sampling: True)
        monkeypatch.setattr(rows, "CapturedStep", EagerStep)
        fetched, fetch = [], rows.RowGroup.sync_tokens_to_host
        monkeypatch.setattr(rows.RowGroup, "sync_tokens_to_host", lambda group: fetched.append(group.read) or fetch(group))
        assert generate(model, *given, eos_id=eos, **options) == expected
        fetched.clear()
        assert generate(model, *given, eos_id=-1, **options) == never
        return fetched

    limits = [30, 20, 9, 25, 12, 30, 30, 30]
    assert run_distributed(check, 1, limits) == [[8, 16, 24, 30]]
    run_distributed(check, 2, limits, pp=2)


class Recorder(TorchDispatchMode):
    """Every operation of a block with its tensors, as a CUDA graph keeps them: numbers of Python as they were, tensors by address."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = lambda tree: {x.untyped_storage().data_ptr() for x in tree_leaves(tree) if isinstance(x, Tensor)}
        if func._schema.is_mutable or not storages(out) <= storages((args, kwargs)):  # no view
            self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.operations:
            for fixed, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if new.data_ptr() != fixed.data_ptr():
                    fixed.copy_(new)


class RecordedStep:
    """Stands for CapturedStep as closely as a CPU can: what is not in its inputs is read where it was when it was recorded."""

    made = 0

    def __init__(self, step, *inputs):
        RecordedStep.made += 1
        self.inputs = [x.clone() for x in inputs]
        step(*self.inputs)
        self.recorder = Recorder()
        with self.recorder:
            self.outputs = step(*self.inputs)

    def __call__(self, *inputs):
        for fixed, new in zip(self.inputs, inputs):
            fixed.copy_(new)
        self.recorder.replay()
        return self.outputs


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_steps_are_captured_once_a_run_and_serve_every_iteration(folders, monkeypatch, family):
    """Other prompts, seeds and weights each time; rows leave by halves, and finished ones fill them. Weights that have moved, another way
    of drawing and a wider cache are captured anew."""

    def captured(model, iteration, **options):
        """How many steps it took, when the tokens are those of steps that are not captured."""
        given = [p[iteration:] or p for p in prompts()] + [[5 + iteration] * (4 + 2 * iteration)]
        sampling = replace(SAMPLED, seed=iteration, max_new_tokens=20, **options)
        write = partial(generate, model, given, [*IDS, 99], sampling, eos_id=EOS, limits=[12, 20, 3, 9, 20, 6, 17, 20])
        plain = write()
        RecordedStep.made = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "is_capturable", lambda device, sampling: True)
            patch.setattr(rows, "CapturedStep", RecordedStep)
            assert write() == plain
        return RecordedStep.made

    def check(layout):
        model, counts = load(layout, folders[family]), []
        with torch.no_grad():
            for iteration in range(3):
                counts.append(captured(model, iteration))
                for param in model.parameters():
                    param.add_(torch.randn_like(param), alpha=0.05)
            counts.append(captured(model, 3, temperature=0.7))
            counts.append(captured(model, 4))
            for param in model.parameters():
                param.data = param.data.clone()
            counts.append(captured(model, 5))
        monkeypatch.setattr(room, "KEPT_COLUMNS", 8)
        model.kept_rooms.free.clear()
        return [*counts, captured(model, 0), captured(model, 5)]

    for stages, most in ((1, 4), (2, 6)):  # 8, 4, 2 rows and 1, or two groups of 4, 2 and 1
        (first, second, third, colder, fourth, moved, narrow, wide), *_ = run_distributed(check, stages, pp=stages)
        assert min(first, colder, moved, narrow) >= 2
        assert first + second + third + fourth <= most and narrow + wide <= most


def rooms_after_a_rollout(layout, folder):
    """How many stay with and without --release-decode-cache, and what is written."""
    model, config = load(layout, folder), Config(method="promptkd")
    samples = [Sample(i, tuple(prompt), ()) for i, prompt in enumerate(prompts())]
    generation = replace(config.generation, max_new_tokens=9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "is_capturable", lambda device, sampling: True)
        patch.setattr(rows, "CapturedStep", EagerStep)
        for release in (False, True):
            asked = replace(config, generation=replace(generation, release_decode_cache=release))
            written = rollout(model, samples, asked, EndIds((EOS,), EOS), 1)
            yield len(room.Rooms.of(model).free), [sample.response for sample in written]


def test_a_rollouts_cache_is_given_back_where_that_is_asked_for(folders):
    ((kept, written), (left, again)), *_ = run_distributed(lambda layout: list(rooms_after_a_rollout(layout, folders["gpt2"])), 1)
    assert kept > left == 0 and written == again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_captured_step_gives_the_same_tokens(folders, monkeypatch):
    """In a fork no GPU can be used: this process is the one rank."""
    from megakd.runtime.initialize import initialize, process_group_closed_at_exit

    with process_group_closed_at_exit():
        model = load(initialize(), folders["llama"])
        captured = generate(model, prompts(), IDS, SAMPLED, eos_id=EOS)
        monkeypatch.setattr(rows, "is_capturable", lambda device, sampling: False)
        assert captured == generate(model, prompts(), IDS, SAMPLED, eos_id=EOS)


@pytest.mark.parametrize("tp, pp", LAYOUTS)
def test_stories260k_tells_its_story_to_the_letter(data_folder, tp, pp):
    """Five layers: three on the first stage, two on the second."""
    folder = data_folder / "models" / "stories260K"

    def tell(layout):
        return generate(load(layout, folder), [[1]], [0], Sampling(max_new_tokens=200, greedy=True), eos_id=2)[0]

    expected = (folder / "expected_greedy_200steps.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for tokens in run_distributed(tell, tp * pp, tp=tp, pp=pp):
        assert tokenizer.decode([1, *tokens], skip_special_tokens=True) == expected


# ---- the distribution


def draws(sampling: Sampling, logits: list[Tensor], shares: list[float], count: int) -> Tensor:
    """`count` samples of one distribution, as frequencies [V]."""
    size = logits[0].shape[0]
    sampler = Sampler(sampling, VocabShard(size), shares, size, torch.device("cpu"))
    streams = noise_streams(sampling.seed, list(range(count)), torch.device("cpu"))
    tokens = sampler([z.expand(count, -1).clone() for z in logits], streams, torch.tensor(4), None)
    return torch.bincount(tokens, minlength=size)


def p_value(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Chance of a chi-square as large, pooled over independent (observed, expected) counts; bins under 5 are put together.

    Not a number of standard deviations: with few degrees of freedom chi-square is skewed, and 4 of them are no rarity.
    """
    statistic, degrees = 0.0, 0
    for observed, expected in pairs:
        assert observed[expected == 0].sum() == 0, "a token of probability 0 was drawn"
        rare = expected < 5
        o, e = (torch.cat([x[~rare].double(), x[rare].sum()[None].double()]) for x in (observed, expected))
        o, e = o[e > 0], e[e > 0]
        statistic, degrees = statistic + ((o - e) ** 2 / e).sum(), degrees + len(e) - 1
    return torch.special.gammaincc(torch.tensor(degrees / 2, dtype=torch.float64), statistic / 2).item()


SEEDS, COUNT = (1234, 0, 1, 2, 3), 20_000


def samples(settings: dict, logits: list[Tensor], shares: list[float]) -> list[Tensor]:
    return [draws(Sampling(**settings, seed=seed), logits, shares, COUNT) for seed in SEEDS]


def fit(observed: list[Tensor], probabilities: Tensor) -> float:
    return p_value([(counts, COUNT * probabilities) for counts in observed])


def draw_with_another_sum(layout):
    """Top-p, where a rank's sums of a row are not its neighbour's, as a GPU's may be."""
    if layout.tp_rank == 1:
        sampling.keep_top_p = lambda z, p: z.masked_fill(z >= z.amax(-1, keepdim=True), -torch.inf)
    z = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)).tensor_split(2, 1)[layout.tp_rank].contiguous()
    sampler = Sampler(Sampling(top_p=0.3), VocabShard(40, tp_group=layout.tp_group), [1.0], 20, layout.device)
    return sampler([z], noise_streams(1, list(range(6)), layout.device), torch.tensor(0), None).tolist()


def test_tensor_parallel_ranks_agree_on_a_token():
    first, second = run_distributed(draw_with_another_sum, 2, tp=2)
    assert first == second


def test_samples_follow_the_softmax_with_temperature_top_k_and_top_p():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    z = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 2
    together = {"temperature": 1.3, "top_k": 40, "top_p": 0.8}
    for settings in ({}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 12}, {"top_p": 0.7}, together):
        warped = z[None] / settings.get("temperature", 1.0)
        assert torch.equal(warped, TemperatureLogitsWarper(settings.get("temperature", 1.0))(None, z[None]))
        if "top_k" in settings:
            warped = TopKLogitsWarper(settings["top_k"])(None, warped)
        if "top_p" in settings:
            warped = TopPLogitsWarper(settings["top_p"])(None, warped)
        observed = samples(settings, [z], [1.0])
        assert fit(observed, warped.softmax(-1)[0]) > 1e-4, settings
        assert fit(observed, (warped * 1.05).softmax(-1)[0]) < 1e-4, "a wrong temperature goes unseen"


def test_mixed_samples_follow_the_mixture():
    generator = torch.Generator().manual_seed(1)
    q, p = (torch.randn(100, generator=generator) * 2 for _ in range(2))
    expected = 0.8 * (q / 0.9).softmax(-1) + 0.2 * (p / 0.9).softmax(-1)
    assert fit(samples({"temperature": 0.9}, [q, p], [0.8, 0.2]), expected) > 1e-4


def test_rare_tokens_come_as_often_as_they_should():
    """A token of probability 1e-4, five million draws."""
    z = torch.tensor([0.0, math.log(1e-4)])
    rare = sum(draws(Sampling(seed=seed), [z], [1.0], 500_000)[1].item() for seed in range(10))
    assert abs(rare - 500) < 4 * math.sqrt(500)


def test_noise_is_uniform_over_tokens_rows_positions_and_seeds():
    rows, tokens = 64, torch.arange(50_257, dtype=torch.int32)
    keys = noise_streams(1, list(range(rows)), torch.device("cpu"))
    u = uniform31(keys, tokens) / 2**31
    for view in (u, u.t()):  # along tokens, along rows
        flat = view.flatten()
        assert p_value([(torch.histc(flat, 1000, 0, 1), torch.full((1000,), len(flat) / 1000))]) > 1e-4
        pairs = torch.histc((flat[:-1] * 30).floor() * 30 + (flat[1:] * 30).floor(), 900, 0, 900)
        assert p_value([(pairs, torch.full((900,), len(flat) / 900))]) > 1e-4, "neighbours are not independent"
    stream = noise_streams(9, [3], torch.device("cpu"))
    for first, second in ((0, 1), (1, 2), (0, 2**40)):
        a, b = (gumbel(stream, torch.tensor(position), tokens) for position in (first, second))
        assert abs(torch.corrcoef(torch.cat([a, b]))[0, 1]) < 4 / math.sqrt(len(tokens))
    seeds = [(1, 2), (1234, 1235), (0, 2**40), (137 * 1_000_003 + 1, 137 * 1_000_003 + 2)]  # the last: a run's iterations
    for first, second in seeds:
        a, b = (gumbel(noise_streams(seed, [3], torch.device("cpu")), torch.tensor(0), tokens) for seed in (first, second))
        assert abs(torch.corrcoef(torch.cat([a, b]))[0, 1]) < 4 / math.sqrt(len(tokens)), "neighbouring seeds are not independent"
    of_seeds = torch.cat([noise_streams(seed, [3], torch.device("cpu")) for seed in range(4096)])
    over_seeds = uniform31(of_seeds, tokens[:8]).flatten() / 2**31
    assert p_value([(torch.histc(over_seeds, 100, 0, 1), torch.full((100,), len(over_seeds) / 100))]) > 1e-4
    g = gumbel(keys, torch.tensor(0), tokens)
    assert g.mean().item() == pytest.approx(0.577216, abs=3e-3) and g.var().item() == pytest.approx(math.pi**2 / 6, abs=1e-2)


# ---- the edges


def test_a_response_ends_where_the_context_ends(folders):
    def check(layout):
        model = load(layout, folders["llama"])
        long = list(range(2, 60))
        responses = generate(model, [long, [5]], [0, 1], Sampling(max_new_tokens=100), eos_id=-1, soft_prompt=soft_prompt())
        assert [len(response) for response in responses] == [64 - 58 - 3, 64 - 1 - 3]
        with pytest.raises(ValueError, match=r"prompt 1 has 62 tokens.*soft prompt 3.*context of 64.*to 60 tokens or fewer"):
            generate(model, [[1], [1] * 62], [0, 1], GREEDY, eos_id=EOS, soft_prompt=soft_prompt())
        with pytest.raises(ValueError, match="prompt 0 has no tokens"):
            generate(model, [[]], [0], GREEDY, eos_id=EOS)
        assert generate(model, [], [], GREEDY, eos_id=EOS) == []

    run_distributed(check, 1)


def test_models_that_cannot_be_mixed_are_refused(folders, tmp_path):
    def check(layout):
        model = load(layout, folders["llama"])
        other = load(layout, tiny_folder(tmp_path / "other", "llama", vocab_size=90, layers=1))
        with pytest.raises(ValueError, match="vocabularies of 97 and 90 tokens cannot be mixed"):
            generate(model, [[1]], [0], GREEDY, eos_id=EOS, mix_with=[MixtureComponent(other, 0.5)])
        with pytest.raises(ValueError, match=r"shares \[0.0, 1.0\].*above 0"):
            generate(model, [[1]], [0], GREEDY, eos_id=EOS, mix_with=[MixtureComponent(model, 1.0)])

    run_distributed(check, 1)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0: it must be 1 or more"),
        ({"temperature": 0.0}, "--temperature 0.0: it must be above 0; for the most likely token set greedy"),
        ({"top_p": 1.5}, "--top-p 1.5: it must be above 0 and at most 1"),
        ({"top_k": -1}, r"--top-k -1: it must be 0 \(all tokens\) or more"),
    ],
)
def test_settings_out_of_range_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**setting)


def test_slices_hold_prompts_of_like_length():
    slices = slices_of_like_length([100, 90, 75, 74, 60, 10])
    assert [(list(s.rows), s.width) for s in slices] == [([0, 1, 2], 100), ([3, 4], 74), ([5], 10)]


def test_mixture_of_a_model_with_itself_is_the_model(folders):
    def check(layout):
        model = load(layout, folders["opt"])
        both = generate(model, prompts(), IDS, SAMPLED, eos_id=EOS, mix_with=[MixtureComponent(model, 0.3)])
        return both == generate(model, prompts(), IDS, SAMPLED, eos_id=EOS)

    assert all(run_distributed(check, 2, tp=2))


def test_greedy_mixture_is_the_argmax_of_the_mixed_probabilities(folders):
    def check(layout):
        student, teacher = load(layout, folders["llama"]), load(layout, folders["gpt2"])
        return generate(student, prompts(), IDS, GREEDY, eos_id=-1, mix_with=[MixtureComponent(teacher, 0.4)])

    models = [tiny_model(tiny_config(**VARIANTS[name])) for name in ("llama", "gpt2")]
    for prompt, response in zip(prompts(), run_distributed(check, 1)[0]):
        tokens = torch.tensor([prompt + response])
        with torch.no_grad():
            q, p = (model(tokens).logits[0, len(prompt) - 1 : -1].softmax(-1) for model in models)
        assert (0.6 * q + 0.4 * p).argmax(-1).tolist() == response


def in_batches(layout, folder):
    """Forty prompts, this replica's share, by batch size: responses by sample."""
    model = load(layout, folder)
    generator = torch.Generator().manual_seed(11)
    rows = [torch.randint(2, 90, (3 + i % 9,), generator=generator).tolist() for i in range(40)]
    mine = range(layout.dp_rank, 40, layout.dp_size)
    run = lambda size: generate(model, [rows[i] for i in mine], list(mine), SAMPLED, eos_id=EOS, batch_size=size)
    return {size: dict(zip(mine, run(size))) for size in (1, 32)}


def test_sampled_tokens_are_the_same_in_batches_of_1_and_32_and_over_replicas(folders):
    (alone,) = run_distributed(in_batches, 1, folders["llama"])
    assert alone[1] == alone[32]
    first, second = run_distributed(in_batches, 2, folders["llama"])
    assert first[32] | second[32] == alone[32]


def test_a_penalty_lowers_negative_logits_too():
    lowered = sampling.penalize(torch.tensor([[2.0, -2.0, -1.0]]), torch.tensor([[0, 1]]), 2.0)
    assert lowered.tolist() == [[1.0, -4.0, -1.0]]
