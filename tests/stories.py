"""Some iterations of every method, told once by the oracle: what each layout must then show. Nothing in a story is megakd's but the noise.

Warm-up, decay, clipping and Adam's moments show from the second iteration on, a phase of MiniLLM at its second batch and epoch; no
setting has its default, so that one that is read and not used shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from oracle import SGD, Adam, Oracle
from tiny import tiny_config, tiny_model

from megakd.config import Config
from megakd.data.batch import Sample
from megakd.data.dataloader import split_across_dp
from megakd.generation.sampling import gumbel, noise_streams

SEED, TOTAL_ITERS, LIMIT, TEMPERATURE = 137, 6, 6, 0.8
LR, PROMPT_LR, MIN_LR, WARMUP = 1e-2, 2e-2, 1e-3, 2
RATES = (5e-3, 1e-2, 1e-2, 8.681981e-3, 5.5e-3, 2.318019e-3)  # 2 of warm-up, then a cosine to MIN_LR one iteration after the last
PROMPT_RATES = (1e-2, 2e-2, 2e-2, 1.72175144e-2, 1.05e-2, 3.78248558e-3)
ADAM = Adam(RATES, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, clip=0.3)  # a large epsilon: the update stays a smooth function of the gradient
DESCENT = SGD(RATES, momentum=0.7, weight_decay=0.1, clip=0.3)
PROMPT_INIT = [11, 12, 13, 11, 12, 13, 11]  # what the tests' tokenizer makes of any text, repeated to --prompt-len
PHI = 0.6  # of DistiLLM, as if held-out losses had risen six times

PAIRS = {  # student, teacher; transformers reads OPT's and Llama's id 1 as padding, whose row learns nothing from being read
    "gpt2": ({"family": "gpt2", "layers": 2, "pad_token_id": 1}, {"family": "gpt2", "layers": 4, "hidden": 96}),
    "opt": ({"family": "opt", "layers": 2}, {"family": "opt", "layers": 2, "hidden": 96}),
    "llama": ({"family": "llama", "layers": 2, "pad_token_id": 1}, {"family": "llama", "layers": 4, "num_key_value_heads": 1}),
    "llama student of a gpt2": ({"family": "llama", "layers": 2, "tie_word_embeddings": True, "pad_token_id": -1}, {"family": "gpt2", "layers": 2}),
}


def global_batch(number: int = 0) -> list[Sample]:
    """Three of them, in turn: a later epoch brings the same rows back. Ids 1 and 96, which a config may name as padding, are read."""
    number %= 3
    generator = torch.Generator().manual_seed(5 + number)
    lengths = [(4, 9), (7, 3), (2, 12), (5, 5), (9, 1), (3, 7), (6, 2), (4, 6)]
    draw = lambda n: tuple(torch.randint(2, 90, (n,), generator=generator).tolist())
    return [
        Sample(8 * number + i, (*draw(prompt - 2), 96, 1), (*draw(response - 1), 0)) for i, (prompt, response) in enumerate(lengths)
    ]


def primed_batch(number: int = 0) -> list[Sample]:
    """The same rows, most of which the teacher reads behind another prompt: longer, shorter, as it is, with words in front or at the end."""
    generator = torch.Generator().manual_seed(77 + number % 3)
    draw = lambda n: tuple(torch.randint(2, 90, (n,), generator=generator).tolist())
    prompts = lambda x: [(*draw(11), *x), None, (*x, *draw(3)), draw(2), x]
    return [replace(sample, teacher_prompt=prompts(sample.prompt)[i % 5]) for i, sample in enumerate(global_batch(number))]


def text_batch(number: int = 0) -> list[Sample]:
    """The same of plain text, for MiniLLM."""
    generator = torch.Generator().manual_seed(9 + number)
    draw = lambda n: tuple(torch.randint(2, 90, (n,), generator=generator).tolist())
    return [Sample(i, draw(2 + i % 3), draw(3 + i)) for i in range(8)]


class Batches:
    """A loader of one replica over one of the three."""

    def __init__(self, batch: Callable, layout):
        self.batch, self.layout = batch, layout
        self.dataset = [sample for number in range(3) for sample in batch(number)]

    def samples(self, iteration):
        return split_across_dp(self.batch(iteration), self.layout.dp_size)[self.layout.dp_rank]


@dataclass(frozen=True)
class Step:
    """One iteration: what is logged, what was written (by sample id), and the student's weights afterwards."""

    metrics: dict
    written: dict[int, tuple[int, ...]]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Story:
    """All of one run; `valid` are the sums of the held-out losses over global batch 0 at its end."""

    steps: list[Step]
    valid: list[float]


@dataclass(frozen=True)
class Case:
    """A method with settings of its own, and what tells its iterations: (metrics, what was written) of each."""

    method: str
    tell: Callable[[Oracle, int], Iterator[tuple[dict, dict]]]
    settings: dict[str, dict] = field(default_factory=dict)  # by group of the configuration
    batch: Callable[[int], list[Sample]] = global_batch
    optimizer: Adam | SGD = ADAM


def noise(iteration: int, sample_ids: list[int]) -> Callable:
    """The sampler's noise at an iteration, as docs/generation.md says it; `row` counts `sample_ids`."""
    seed = SEED * 1_000_003 + iteration
    streams = noise_streams(seed, sample_ids, torch.device("cpu"))
    return lambda row, position, size: gumbel(
        streams[row : row + 1], torch.tensor(position), torch.arange(size, dtype=torch.int32)
    )[0].double()


def answers(oracle: Oracle, mixture, samples, iteration) -> list[Sample]:
    """`mixture`: models and their shares; the teacher reads what is for it."""
    read = rows(samples)
    prompts = {id(oracle.teacher): [z for _, _, z in read]}
    mixture = [(model, share, prompts.get(id(model), [x for x, _, _ in read])) for model, share in mixture]
    written = oracle.write(mixture, LIMIT, noise(iteration, [s.sample_id for s in samples]), temperature=TEMPERATURE)
    return [replace(sample, response=response) for sample, response in zip(samples, written)]


def rows(samples) -> list:
    return [(s.prompt, s.response, s.prompt if s.teacher_prompt is None else s.teacher_prompt) for s in samples]


def responses(samples) -> dict[int, tuple[int, ...]]:
    return {s.sample_id: s.response for s in samples}


def tell_sft(oracle, dp):
    for number in range(4):
        yield oracle.sft(rows(oracle.batch(number))), {}


def tell_kd(oracle, dp):
    """On-policy in the first and the fourth iteration, and there nothing but the divergence is learnt."""
    for number, on_policy in enumerate([True, False, False, True]):
        samples = oracle.batch(number)
        if on_policy:
            samples = answers(oracle, [(oracle.student, 1.0)], samples, number + 1)
        yield oracle.kd(rows(samples), 1.0 if on_policy else 0.3, "jsd", 2.0, 0.3), responses(samples) if on_policy else {}


def tell_seqkd(oracle, dp, kd_ratio=0.4):
    """A prompt that comes back in the fourth iteration has its first answer."""
    for number in range(4):
        samples = answers(oracle, [(oracle.teacher, 1.0)], oracle.batch(number), 0)
        yield oracle.kd(rows(samples), kd_ratio) if kd_ratio else oracle.sft(rows(samples)), responses(samples)


def tell_distillm(oracle, dp):
    """New text, the data, text of before, new text."""
    kept = []
    for iteration, source in enumerate(["new", "data", "old", "new"], start=1):
        samples = oracle.batch(iteration - 1)
        if source == "new":
            kept = samples = answers(oracle, [(oracle.student, 1.0)], samples, iteration)
        elif source == "old":
            rng = random.Random(f"{SEED}/{iteration}")
            rng.random()  # which decided for the buffer
            samples = [kept[rng.randrange(8)] for _ in range(8)]
        metrics = oracle.kd(rows(samples), 1.0, "skew_reverse_kl", alpha=0.2)
        yield metrics | {"on_policy_share": PHI}, responses(samples) if source == "new" else {}


def tell_promptkd(oracle, dp, kinds=("reverse", "reverse")):
    """The base teacher's share falls from 0.7 · 5/6 to 0."""
    for iteration in range(1, 5):
        samples = answers(oracle, [(oracle.student, 1.0)], oracle.batch(iteration - 1), iteration)
        metrics = oracle.promptkd(rows(samples), 0.7 * (1 - iteration / TOTAL_ITERS), kinds)
        yield metrics, responses(samples)


def tell_response_priming(original):
    def told(oracle, dp):
        for number in range(4):
            yield oracle.response_priming(rows(oracle.batch(number)), 0.3, 2.5, original=original), {}

    return told


def tell_minillm(oracle, dp, **changes):
    """Two batches a phase, two epochs of it, and the first iteration of the next."""
    arguments = {"alpha": 0.3, "gamma": 0.9, "scale": 0.7, "limit": 0.8, "clip": 0.05, "lm_coef": 0.6, "kd_ratio": 0.3} | changes
    for iteration in range(1, 6):
        phase, (epoch, position) = (iteration - 1) // 4, divmod((iteration - 1) % 4, 2)
        fresh = {}
        if epoch == position == 0:
            writer = oracle.student_now()
            hands = [split_across_dp(oracle.batch(2 * phase + i), dp) for i in range(2)]
            mine = [[sample for hand in hands for sample in hand[replica]] for replica in range(dp)]
            written = [answers(oracle, [(writer, 0.7), (oracle.teacher, 0.3)], samples, iteration) for samples in mine]
            fresh = {i: response for samples in written for i, response in responses(samples).items()}
        size = 8 // dp
        order = np.random.default_rng((SEED, phase, epoch)).permutation(2 * size)[position * size :][:size]
        chosen = [samples[i] for samples in written for i in order]
        text = text_batch(iteration - 1) if arguments["lm_coef"] else []
        yield oracle.minillm(rows(chosen), rows(text), old_student=writer, **arguments), fresh


MINILLM = {
    "num_rollouts": 16, "ppo_epochs": 2, "teacher_mixed_alpha": 0.3, "gamma": 0.9, "reward_scaling": 0.7, "cliprange_reward": 0.8,
    "cliprange": 0.05, "lm_coef": 0.6,
}  # fmt: skip
PROMPTKD = {"teacher_lr": PROMPT_LR, "base_coef": 0.7}
CASES = {
    "sft": Case("sft", tell_sft),
    "kd": Case(
        "kd",
        tell_kd,
        {"distillation": {"kd_ratio": 0.3, "kd_objective": "jsd", "beta": 0.3, "kd_temperature": 2.0}, "kd": {"on_policy_ratio": 0.5}},
    ),
    "seqkd": Case("seqkd", tell_seqkd, {"distillation": {"kd_ratio": 0.4}}),
    "seqkd, no divergence": Case("seqkd", lambda oracle, dp: tell_seqkd(oracle, dp, 0.0)),
    "distillm": Case(
        "distillm",
        tell_distillm,
        {"distillation": {"kd_objective": "skew_reverse_kl", "skew_alpha": 0.2}, "distillm": {"replay_capacity": 8}},
    ),
    "minillm": Case("minillm", tell_minillm, {"minillm": MINILLM, "distillation": {"kd_ratio": 0.3}}),
    "minillm, policy gradient alone": Case(
        "minillm",
        lambda oracle, dp: tell_minillm(oracle, dp, lm_coef=0.0, exact=False, length_norm=False),
        {"minillm": MINILLM | {"lm_coef": 0.0, "single_step_reg": False, "length_norm": False}},
    ),
    "promptkd": Case("promptkd", tell_promptkd, {"promptkd": PROMPTKD}),
    "promptkd, forward and reverse": Case(
        "promptkd",
        lambda oracle, dp: tell_promptkd(oracle, dp, ("forward", "reverse")),
        {"promptkd": PROMPTKD | {"teacher_kld_type": "forward"}},
    ),
    "promptkd, reverse and forward": Case(
        "promptkd",
        lambda oracle, dp: tell_promptkd(oracle, dp, ("reverse", "forward")),
        {"promptkd": PROMPTKD | {"base_kld_type": "forward"}},
    ),
}
PRIMING = {
    "training": {"optimizer": "sgd", "momentum": DESCENT.momentum},
    "response_priming": {"priming_alpha": 0.3, "priming_temperature": 2.5},
}
ORIGINAL = PRIMING | {"response_priming": PRIMING["response_priming"] | {"priming_objective": "original"}}
for name, settings in {"response_priming, primed": PRIMING, "response_priming, original, primed": ORIGINAL}.items():
    CASES[name] = Case("response_priming", tell_response_priming(settings is ORIGINAL), settings, primed_batch, DESCENT)
CASES |= {f"{name}, primed": replace(CASES[name], batch=primed_batch) for name in ("kd", "seqkd", "distillm", "minillm", "promptkd")}


def story_config(name: str, micro_batch_size: int, parallel: dict) -> Config:
    """The settings of a case, at a layout."""
    case = CASES[name]
    config = Config(method=case.method)
    groups = {
        "training": {
            "micro_batch_size": micro_batch_size, "global_batch_size": 8, "lr": LR, "min_lr": MIN_LR, "lr_warmup_iters": WARMUP,
            "adam_beta1": ADAM.betas[0], "adam_beta2": ADAM.betas[1], "adam_eps": ADAM.eps, "weight_decay": ADAM.weight_decay,
            "clip_grad": ADAM.clip, "seed": SEED,
        },
        "parallel": parallel,
        "generation": {"max_new_tokens": LIMIT, "temperature": TEMPERATURE},
    }  # fmt: skip
    groups |= {group: groups.get(group, {}) | values for group, values in case.settings.items()}
    return replace(config, **{group: replace(getattr(config, group), **values) for group, values in groups.items()})


def pair_of_models(pair, dtype=torch.float32):
    """Student and teacher as transformers models, from the seeds that megakd's take too."""
    return [tiny_model(tiny_config(**spec), seed=seed).to(dtype) for seed, spec in enumerate(pair, start=1)]


def make_oracle(name: str, pair, dtype=torch.float32) -> Oracle:
    student, teacher = pair_of_models(pair, dtype)
    vectors = teacher.get_input_embeddings()(torch.tensor(PROMPT_INIT)).detach()
    return Oracle(student, None if CASES[name].method == "sft" else teacher, CASES[name].optimizer, vectors=vectors, prompt_rates=PROMPT_RATES)


@cache
def story(name: str, pair: str, dp: int = 1) -> Story:
    """A case on a pair of models; MiniLLM's batches depend on the number of replicas, which each shuffle their own responses."""
    return tell(name, PAIRS[pair], dp)


def tell(name: str, pair, dp: int = 1, *, vocab_size: int | None = None, iterations: int | None = None) -> Story:
    oracle, steps = make_oracle(name, pair), []
    oracle.vocab_size, oracle.batch = vocab_size, CASES[name].batch
    for metrics, written in CASES[name].tell(oracle, dp):
        weights = {key: tensor.clone() for key, tensor in oracle.student.state_dict().items()}
        steps.append(Step({key: plain(value) for key, value in metrics.items()}, written, weights))
        if len(steps) == iterations:
            break
    return Story(steps, oracle.held_out(rows(oracle.batch(0))))


def plain(value):
    """A number as a float, vectors as they are."""
    value = torch.as_tensor(value).detach()
    return value if value.ndim else value.item()
