"""Iterations of every method equal an independent float64 computation, at every layout."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import stories
import torch
from distributed import run_distributed
from megakd_kernels import VocabShard, launch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from oracle import Adam, Oracle, StateDictSource
from stories import (
    ADAM,
    CASES,
    PAIRS,
    PROMPT_INIT,
    Batches,
    Story,
    global_batch,
    pair_of_models,
    story,
    story_config,
    tell,
    text_batch,
)  # fmt: skip
from tiny import tiny_config, tiny_model

from megakd.config import (
    Config,
    DistillationConfig,
    DistiLLMConfig,
    GenerationConfig,
    KDConfig,
    MiniLLMConfig,
    PromptKDConfig,
    ResponsePrimingConfig,
    TrainingConfig,
)
from megakd.data.batch import Sample
from megakd.data.dataloader import DataLoader, split_across_dp
from megakd.data.end_ids import EndIds
from megakd.loading import align_vocabularies
from megakd.losses.distillation import Divergence, sft_loss
from megakd.losses.policy_gradient import advantages, importance_weights
from megakd.losses.token_loss import HeadRows
from megakd.methods import METHODS, minillm
from megakd.methods import rollout as rollout_module
from megakd.methods.base import MethodInputs
from megakd.methods.minillm import MiniLLM
from megakd.models.model_provider import build_model, load_weights, parameter_mappings
from megakd.optimizer import StudentOptimizer, learning_rate
from megakd.teachers.live import LiveTeacher
from megakd.trainer import teacher_options, valid_losses

TOTAL_ITERS = 10
CONSTANT = Adam([1e-2] * TOTAL_ITERS, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.1, clip=0.5)  # of the tests of one iteration
ALL, TWO, OTHERS = list(PAIRS), ["gpt2", "llama"], ["opt", "llama student of a gpt2"]
LAYOUTS = [  # tp, pp, dp, sequence parallel, distributed optimizer, micro-batch size, pairs
    pytest.param(1, 1, 1, False, False, 4, ALL, id="one rank, 2 micro-batches", marks=pytest.mark.slow),
    pytest.param(1, 1, 1, False, False, 2, ALL, id="one rank, 4 micro-batches"),
    pytest.param(2, 1, 1, False, False, 4, ALL, id="TP2, 2 micro-batches"),
    pytest.param(1, 2, 1, False, False, 2, ALL, id="PP2, 4 micro-batches"),
    pytest.param(2, 2, 1, True, False, 4, TWO, id="TP2 PP2 SP, 2 micro-batches"),
    pytest.param(2, 2, 1, True, False, 2, OTHERS, id="TP2 PP2 SP, 4 micro-batches"),
    pytest.param(1, 1, 2, False, True, 2, TWO, id="DP2 distributed optimizer, 2 micro-batches", marks=pytest.mark.slow),
    pytest.param(1, 1, 2, False, True, 1, OTHERS, id="DP2 distributed optimizer, 4 micro-batches"),
    pytest.param(2, 2, 2, True, True, 1, ALL, id="TP2 PP2 DP2 SP distributed optimizer, 4 micro-batches", marks=pytest.mark.slow),
]


def samples() -> list[Sample]:
    return global_batch(0)


def run_config(method: str, micro_batch_size: int, parallel: dict) -> Config:
    config = Config(method=method)
    training = replace(
        config.training, micro_batch_size=micro_batch_size, global_batch_size=8, lr=1e-2, lr_decay_style="constant",
        weight_decay=CONSTANT.weight_decay, clip_grad=CONSTANT.clip, adam_eps=CONSTANT.eps,
    )  # fmt: skip
    return replace(
        config,
        training=training,
        parallel=replace(config.parallel, **parallel),
        generation=replace(config.generation, max_new_tokens=12),
    )


TOKENIZER = SimpleNamespace(encode=lambda text, add_special_tokens: [11, 12, 13])
ENDS = EndIds(stop=(0,), taught=0)


def method_inputs(layout, config, pair, dtype=torch.float32, total_iters=TOTAL_ITERS) -> MethodInputs:
    """What a method works on, with the models of `models_of`."""
    student, teacher = models_of(layout, config, pair, dtype)
    distributed = config.parallel.use_distributed_optimizer
    optimizer = StudentOptimizer(student, config.training, total_iters=total_iters, distributed=distributed)
    return MethodInputs(student, optimizer, LiveTeacher(teacher) if config.needs_teacher else None, TOKENIZER, ENDS)


def models_of(layout, config, pair, dtype=torch.float32):
    """Student and teacher from the same seeds that the oracle takes."""
    specs = [tiny_config(**spec) for spec in pair]
    options = align_vocabularies([spec.vocab_size for spec in specs], layout.tp_size)
    options |= {"sequence_parallel": config.parallel.sequence_parallel, "dtype": dtype}
    student = build_model(specs[0], layout, **options)
    teacher = build_model(specs[1], layout, **options, **teacher_options(config))
    load_weights(student, StateDictSource(tiny_model(specs[0], seed=1)))
    load_weights(teacher, StateDictSource(tiny_model(specs[1], seed=2)))
    return student, teacher.eval().requires_grad_(False)


def oracle(pair, dtype=torch.float32) -> Oracle:
    student, teacher = pair_of_models(pair, dtype)
    return Oracle(student, teacher, CONSTANT, vectors=teacher.get_input_embeddings().weight[PROMPT_INIT].detach(), prompt_rates=CONSTANT.rates)


def check_story(layout, case, told: Story, pair, micro_batch_size, parallel):
    """Every iteration: what is logged, what is written on all replicas, the weights of this rank; then the held-out losses."""
    config = story_config(case, micro_batch_size, parallel)
    parts = replace(method_inputs(layout, config, pair, total_iters=stories.TOTAL_ITERS), text=Batches(text_batch, layout) if config.minillm.lm_coef else None)
    method = METHODS[config.method](parts, config, total_iters=stories.TOTAL_ITERS)
    extra = method.extra_tensors()
    if "vectors" in extra:
        assert torch.equal(extra["vectors"], pair_of_models(pair)[1].get_input_embeddings()(torch.tensor(PROMPT_INIT)))
    if "threshold" in extra:
        extra["threshold"].fill_(stories.PHI)
    for iteration, step in enumerate(told.steps, start=1):
        method.rollouts = ()
        got, where = method.train_iteration(Batches(CASES[case].batch, layout), iteration), (case, pair, iteration)
        assert {s.sample_id: s.response for s in method.all_gather_samples(method.rollouts)} == step.written, where
        numbers = {name: value for name, value in step.metrics.items() if not torch.is_tensor(value)}
        assert {name: got[name] for name in numbers} == pytest.approx(numbers, rel=3e-6, abs=1e-6), where
        check_weights(method.student, step.weights, where)
        if "vectors" in step.metrics:
            check_prompt(method, step.metrics, where)
    *valid, tokens = told.valid
    means = dict(zip(("valid/lm_loss", "valid/reverse_kl"), (total / tokens for total in valid)))
    assert valid_losses(method, CASES[case].batch(0)) == pytest.approx(means, rel=1e-5), (case, pair)


def check_stories(layout, told, micro_batch_size, parallel):
    for case, pair, run in told:
        check_story(layout, case, run, PAIRS[pair], micro_batch_size, parallel)


def check_weights(student, reference, where):
    """Every updated weight of this rank against the float64 update, through the same name table as a checkpoint."""
    source = StateDictSource(reference)
    for param, mapping in parameter_mappings(student):
        want = mapping.read_shard(source, student.layout.tp_rank, student.layout.tp_size)
        assert (param.double() - want).abs().max() <= 3e-6, (where, mapping)


def check_prompt(method, want, where):
    clipped = want["gradient"] * min(1.0, ADAM.clip / want["gradient"].norm())
    gradient = method.learner.soft_prompt.grad
    assert (gradient.double() - clipped).abs().max() <= 1e-6 * max(1.0, clipped.abs().max()), where
    assert (method.learner.soft_prompt.double() - want["vectors"]).abs().max() <= 3e-6, where
    assert all(param.grad is None and not hasattr(param, "main_grad") for param in method.teacher.model.parameters()), (
        "the teacher is frozen"
    )


GROUPS = {"sft and kd": ["sft", "kd"], "promptkd": ["promptkd"]}
PRIMED = [case for case in CASES if case.endswith("primed")]
GROUPS["the others"] = [case for case in CASES if case not in ("sft", "kd", "promptkd", *PRIMED)]


TWO_PER_STAGE = "TP2 PP2 SP, 2 micro-batches"
USUAL = [  # the others meet this grid at 4 micro-batches, more than it has stages; how many there are, they leave to what SFT, KD and PromptKD call
    pytest.param(*layout.values, cases, id=f"{layout.id}-{cases}", marks=(*layout.marks, *([pytest.mark.slow] if (layout.id, cases) == (TWO_PER_STAGE, "the others") else [])))
    for layout in LAYOUTS for cases in GROUPS
]  # fmt: skip


@pytest.mark.parametrize("tp, pp, dp, sp, zero, micro_batch_size, pairs, cases", USUAL)
def test_iterations_equal_float64_transformers(cases, tp, pp, dp, sp, zero, micro_batch_size, pairs):
    parallel = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": sp,
        "use_distributed_optimizer": zero,
    }
    pairs = pairs[-1:] if cases == "the others" else pairs
    told = [(case, pair, story(case, pair, dp if "minillm" in case else 1)) for case in GROUPS[cases] for pair in pairs]
    run_distributed(check_stories, tp * pp * dp, told, micro_batch_size, parallel, tp=tp, pp=pp)


@pytest.mark.parametrize(
    "tp, pp, dp, sp",
    [
        (1, 1, 1, False),
        pytest.param(2, 1, 1, False, marks=pytest.mark.slow),  # what is read where is decided before ranks part: both ways of parting at once show it
        pytest.param(1, 2, 1, False, marks=pytest.mark.slow),
        (2, 2, 1, True),
        (1, 1, 2, False),
    ],
)
def test_a_teacher_that_reads_another_text_teaches_the_same_tokens(tp, pp, dp, sp):
    """Every method, with prompts of unequal lengths for student and teacher: losses, what is written, weights, the soft prompt's gradient."""
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": sp}
    pair = OTHERS[-1] if tp == pp else "gpt2"
    told = [(case, pair, story(case, pair, dp if "minillm" in case else 1)) for case in PRIMED]
    run_distributed(check_stories, tp * pp * dp, told, 2 if dp == 1 else 1, parallel, tp=tp, pp=pp)


@pytest.mark.parametrize("case", ["minillm", "promptkd"])
def test_minillm_and_promptkd_equal_float64_transformers_for_every_pair(case):
    told = [(case, pair, story(case, pair)) for pair in PAIRS]
    run_distributed(check_stories, 1, told, 4, {})


def test_a_story_shows_what_one_iteration_hides():
    """The padding id is written, the student's and the prompt's gradients are clipped, and once they are not."""
    told = story("promptkd", "opt").steps
    assert any(1 in response for step in told for response in step.written.values())
    for name in ("grad_norm", "grad_norm/prompt"):
        assert {step.metrics[name] > ADAM.clip for step in told} == {True, False}


def one_iteration(reference, method, method_name):
    """The same iteration by the oracle, on what the method has written or the data say."""
    rows = stories.rows(method.all_gather_samples(method.rollouts) if method.on_policy else samples())
    if method_name == "promptkd":
        return reference.promptkd(rows, base_coef=1 - 1 / TOTAL_ITERS)
    return reference.sft(rows) if method_name == "sft" else reference.kd(rows, kd_ratio=0.5)


def check_bfloat16(layout, method_name, parallel):
    for name, pair in [("tied llama", PAIRS["llama student of a gpt2"]), ("opt", PAIRS["opt"])][: 3 - layout.tp_size]:
        config = run_config(method_name, 2, parallel)
        method = METHODS[method_name](method_inputs(layout, config, pair, torch.bfloat16), config, total_iters=TOTAL_ITERS)
        got = method.train(split_across_dp(samples(), layout.dp_size)[layout.dp_rank], 1)
        assert all(param.main_grad.dtype == torch.float32 for param in method.student.parameters()), "gradients are summed in float32"
        want = one_iteration(oracle(pair, torch.bfloat16), method, method_name)
        for key in want.keys() - {"gradient", "vectors"}:
            assert got[key] == pytest.approx(float(want[key]), rel=2e-2, abs=1e-3), (name, key)
        loss = {"sft": "loss/lm", "kd": "loss/total", "promptkd": "loss/reverse_kl"}[method_name]
        later = [method.train(split_across_dp(samples(), layout.dp_size)[layout.dp_rank], i)[loss] for i in range(2, 7)]
        assert later[-1] < got[loss], (name, later)


@pytest.mark.parametrize("method_name", ["sft", "kd", "promptkd"])
@pytest.mark.parametrize("tp, pp, dp", [(1, 1, 1), (2, 2, 1), (1, 1, 2)])
def test_bfloat16_weights_train_as_float64_does(method_name, tp, pp, dp):
    parallel = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": tp > 1,
        "use_distributed_optimizer": dp > 1,
    }
    run_distributed(check_bfloat16, tp * pp * dp, method_name, parallel, tp=tp, pp=pp)


def test_the_heads_gradient_is_never_rounded_to_bfloat16():
    draw = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    hidden, head = draw(40, 16).bfloat16(), draw(30, 16).bfloat16().requires_grad_()
    exact_head = head.detach().double().requires_grad_()
    head.main_grad = torch.zeros(30, 16)
    vocabulary, labels = VocabShard(30), torch.arange(40) % 30
    for loss in (lambda q: sft_loss(q, labels, vocabulary).objective_N,
                 lambda q: Divergence("reverse_kl")(q, HeadRows(hidden, head.detach().flip(0)), vocabulary)):  # fmt: skip
        loss(HeadRows(hidden, head)).sum().backward()
    log_q = torch.log_softmax(hidden.double() @ exact_head.t(), -1)
    log_p = torch.log_softmax(hidden.double() @ exact_head.detach().flip(0).t(), -1)
    (-log_q[torch.arange(40), labels].sum() + (log_q.exp() * (log_q - log_p)).sum()).backward()
    assert head.grad is None and (head.main_grad - exact_head.grad).norm() <= 1e-2 * exact_head.grad.norm()
    assert (head.main_grad.bfloat16().float() != head.main_grad).float().mean() > 0.9


def check_no_shape_travels(layout):
    """Micro-batches of unlike width, with a soft prompt, in unlike numbers of micro-batches and stages."""
    P2PCommunicator._communicate_shapes = lambda *args: pytest.fail("a shape was sent")
    pair = {"family": "gpt2", "layers": 3}, {"family": "gpt2", "layers": 4, "hidden": 96}
    parallel = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": layout.pp_size}
    check_story(layout, "promptkd", tell("promptkd", pair, iterations=1), pair, 1, parallel)


def test_every_stage_knows_the_shapes_that_it_is_sent():
    run_distributed(check_no_shape_travels, 3, pp=3)


OBJECTIVES = ["reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
FEWER_LAYOUTS = [
    pytest.param(*layout, id=f"TP{layout[0]} PP{layout[1]} DP{layout[2]}")
    for layout in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]
]


def check_divergences(layout, parallel):
    """KD with every divergence, temperature 2."""
    pair = PAIRS["llama"]
    for objective in OBJECTIVES:
        config = run_config("kd", 4, parallel)
        config = replace(
            config, distillation=replace(config.distillation, kd_objective=objective, kd_temperature=2.0, beta=0.3, kd_ratio=0.8)
        )
        method = METHODS["kd"](method_inputs(layout, config, pair), config, total_iters=TOTAL_ITERS)
        got = method.train(split_across_dp(samples(), layout.dp_size)[layout.dp_rank], 1)
        reference = oracle(pair)
        want = reference.kd(stories.rows(samples()), 0.8, objective, 2.0, 0.3, 0.1)
        for key, value in want.items():
            assert got[key] == pytest.approx(float(value), rel=1e-6, abs=1e-6), (objective, key)
        check_weights(method.student, reference.student, objective)


@pytest.mark.parametrize("tp, pp, dp", FEWER_LAYOUTS)
def test_every_divergence_equals_float64_transformers(tp, pp, dp):
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    run_distributed(check_divergences, tp * pp * dp, parallel, tp=tp, pp=pp)


def check_seqkd_writes_once(layout):
    config = run_config("seqkd", 2, {})
    method = METHODS["seqkd"](method_inputs(layout, config, PAIRS["gpt2"]), config, total_iters=TOTAL_ITERS)
    method.train(split_across_dp(samples(), layout.dp_size)[layout.dp_rank], 1)
    first = dict(method.written)
    method.write = lambda missing: pytest.fail("written twice") if missing else None
    method.train(split_across_dp(samples(), layout.dp_size)[1 - layout.dp_rank], 2)  # the other replica's prompts
    return {i: sample.response for i, sample in first.items()}


def test_a_response_of_the_teacher_is_written_once_for_all_replicas():
    first, second = run_distributed(check_seqkd_writes_once, 2)
    assert first == second and len(first) == 8


def losses_by_budget(layout):
    """The same losses however the rows are cut into micro-batches."""
    logged = []
    for tokens in (None, 24, 1):
        config = run_config("kd", 8, {})
        config = replace(config, training=replace(config.training, micro_batch_tokens=tokens))
        method = METHODS["kd"](method_inputs(layout, config, PAIRS["gpt2"]), config, total_iters=TOTAL_ITERS)
        logged.append((len(method.batches(samples())), method.train(samples(), 1)))
    return logged


def test_a_token_budget_changes_no_loss():
    (logged,) = run_distributed(losses_by_budget, 1)
    assert [count for count, _ in logged] == sorted({count for count, _ in logged}) and logged[-1][0] == 8
    for _, metrics in logged[1:]:
        for name in ("loss/total", "loss/lm", "loss/forward_kl", "grad_norm"):
            assert metrics[name] == pytest.approx(logged[0][1][name], rel=1e-6, abs=1e-6), name


def check_distillm(layout):
    """The three sources of a batch, and the buffer that a checkpoint brings back; a function of (seed, iteration) at any layout."""
    config = run_config("distillm", 2, {})
    config = replace(config, distillation=replace(config.distillation, kd_objective="skew_reverse_kl"), distillm=replace(config.distillm, replay_capacity=16))
    config = replace(config, data=replace(config.data, max_length=32))
    method = METHODS["distillm"](method_inputs(layout, config, PAIRS["gpt2"]), config, total_iters=1000)
    mine = split_across_dp(samples(), layout.dp_size)[layout.dp_rank]
    learnt = []
    method.learn = lambda rows, iteration, *, kd_ratio: learnt.append(rows) or {"kd_ratio": kd_ratio}
    method.train(mine, 1)
    assert learnt[-1] == mine, "φ = 0: the data"
    for loss in (2.0, 1.0, 2.05, 2.1):  # compared with the first, 2.0
        method.on_evaluation({"valid/lm_loss": loss})
    assert method.threshold.item() == pytest.approx(0.1)
    method.threshold.fill_(1.0)
    method.dataset = global_batch(0)
    assert method.train(mine, 2)["kd_ratio"] == 1.0 and [s.prompt for s in learnt[-1]] == [s.prompt for s in mine]
    assert method.buffer.written == 8 and learnt[-1] != mine, "the student writes, and the buffer keeps it"
    method.train(mine, 3)
    again = METHODS["distillm"](method_inputs(layout, config, PAIRS["gpt2"]), config, total_iters=1000)
    for name, tensor in again.extra_tensors().items():
        tensor.copy_(method.extra_tensors()[name])
    kept = [again.buffer[i] for i in range(16)]
    method.train(mine, 999)
    assert method.buffer.is_full and all(sample in kept for sample in learnt[-1]), "a draw from the buffer"
    return kept, sorted(learnt[-1], key=lambda s: s.response)


def test_distillm_takes_its_batches_where_the_paper_does():
    kept = [run_distributed(check_distillm, dp)[0][0] for dp in (1, 2)]
    assert kept[0] == kept[1]


def losses_of_three_iterations(layout, method_name):
    """With the kernels of this device, and with the reference."""
    logged = {}
    for implementation in ("rows", "reference"):
        with launch.use(implementation):
            config = run_config(method_name, 4, {})
            method = METHODS[method_name](method_inputs(layout, config, PAIRS["llama"]), config, total_iters=TOTAL_ITERS)
            logged[implementation] = [method.train(split_across_dp(samples(), layout.dp_size)[layout.dp_rank], i) for i in (1, 2, 3)]
    return logged


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("method_name", ["kd", "promptkd"])
def test_training_with_the_kernels_equals_training_with_the_reference(method_name, tp, pp):
    for logged in run_distributed(losses_of_three_iterations, tp * pp, method_name, tp=tp, pp=pp):
        for ours, reference in zip(logged["rows"], logged["reference"]):
            assert {name: ours[name] for name in ours if "loss" in name} == pytest.approx(
                {name: reference[name] for name in reference if "loss" in name}, rel=1e-6, abs=1e-6
            )


def check_unequal_widths(layout, told):
    for case, pair, run in told:
        check_story(layout, case, run, pair, 4, {})


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    "method_name, widths, hidden",
    [("promptkd", (97, 160), 64), ("kd", (151_936, 152_064), 16)],
    ids=["97 and 160", "151,936 and 152,064"],
)
def test_vocabularies_of_unequal_width_are_aligned_by_token_id(tp, method_name, widths, hidden):
    """Either way round: losses and rollouts are those of the ids that both share, dense, in float64."""
    models = [{"family": "llama", "layers": 2, "hidden": hidden, "vocab_size": width} for width in widths]
    pairs = [tuple(models), tuple(models[::-1])]
    told = [(method_name, pair, tell(method_name, pair, vocab_size=min(widths), iterations=1)) for pair in pairs]
    run_distributed(check_unequal_widths, tp, told, tp=tp)


def test_advantages_of_the_hand_example():
    rewards, mask = torch.ones(1, 3), torch.ones(1, 3)
    assert advantages(rewards, mask, gamma=0.95, length_norm=False).tolist()[0] == pytest.approx([2.8525, 1.95, 1.0])
    assert advantages(rewards, mask, gamma=0.95).tolist()[0] == pytest.approx([0.950833, 0.975, 1.0], abs=1e-6)


def test_without_the_teacher_in_the_mixture_the_importance_weight_is_one():
    log_p, log_q = torch.tensor([-3.0, -80.0, -1.0]), torch.tensor([-1.0, -2.0, -60.0])
    assert importance_weights(log_p, log_q, alpha=0.0).tolist() == [1.0, 1.0, 1.0]


def positions_of(layout):
    config = run_config("sft", 8, {})
    method = METHODS["sft"](method_inputs(layout, config, PAIRS["gpt2"]), config, total_iters=TOTAL_ITERS)
    return method.train(split_across_dp(samples(), layout.dp_size)[layout.dp_rank], 1)


def test_positions_and_tokens_of_the_global_batch_are_counted():
    """A replica has one micro-batch: rows short enough for one are not parted."""
    read = [len(s.prompt) + len(s.response) - 1 for s in samples()]
    for replicas in (1, 2):
        (logged, *_) = run_distributed(positions_of, replicas)
        hands = [[s.num_positions for s in hand] for hand in split_across_dp(samples(), replicas)]
        computed = sum(len(hand) * max(hand) for hand in hands)
        assert (logged["positions"], logged["tokens"]) == (sum(read), sum(len(s.response) for s in samples()))
        assert logged["real_share"] == pytest.approx(sum(read) / computed) and sum(read) < computed


def random_prompts(layout):
    prompts = []
    for seed in (1, 1, 2):
        config = run_config("promptkd", 4, {})
        config = replace(config, training=replace(config.training, seed=seed), promptkd=replace(config.promptkd, prompt_init="random"))
        method = METHODS["promptkd"](method_inputs(layout, config, PAIRS["llama"]), config, total_iters=TOTAL_ITERS)
        prompts.append(method.learner.soft_prompt.tolist())
    return prompts


def test_a_random_prompt_is_the_seeds():
    """At every layout, and as large as the teacher's words."""
    ((one, again, other),) = run_distributed(random_prompts, 1)
    assert one == again and one != other
    words = pair_of_models(PAIRS["llama"])[1].get_input_embeddings().weight
    assert torch.tensor(one).std().item() == pytest.approx(words.std().item(), rel=0.15)
    for ranks, sizes in ((2, {"tp": 2}), (2, {"pp": 2})):
        for prompts in run_distributed(random_prompts, ranks, **sizes):
            torch.testing.assert_close(torch.tensor(prompts[0]), torch.tensor(one))


def test_a_rollout_is_drawn_as_the_flags_say(monkeypatch):
    asked = {}
    monkeypatch.setattr(rollout_module, "generate", lambda *_, **options: asked.update(options, sampling=_[3]) or [[5, 0]] * 8)
    config = run_config("promptkd", 4, {})
    flags = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "max_new_tokens": 5, "rollout_batch_size": 3}
    config = replace(config, generation=replace(config.generation, **flags))
    rollout_module.rollout(None, samples(), config, ENDS, 4)
    given = {name: getattr(asked["sampling"], name) for name in list(flags)[:-1]} | {"rollout_batch_size": asked["batch_size"]}
    assert given == flags and not asked["sampling"].greedy and asked["sampling"].seed == 1234 * 1_000_003 + 4


def texts_of_minillm(layout):
    opened = []
    minillm.open_responses = lambda path, tokenizer, data, **options: opened.append((path, options["full_rows"])) or list(global_batch(0)) * 2
    config = run_config("minillm", 4, {})
    config = replace(config, data=replace(config.data, train_data="prompts"), minillm=replace(config.minillm, num_rollouts=8))
    loaders = []
    for lm_data in ("", "text"):
        changed = replace(config, minillm=replace(config.minillm, lm_data=lm_data))
        loaders.append([s.sample_id for s in MiniLLM.open_text(changed, TOKENIZER, layout).samples(0)])
    prompts = DataLoader(list(global_batch(0)) * 2, global_batch_size=8, seed=1234)
    return opened, loaders, [s.sample_id for s in prompts.samples(0)]


def test_minillms_text_comes_in_an_order_of_its_own():
    """And from where --lm-data says, in rows of full length."""
    ((opened, (first, second), prompts),) = run_distributed(texts_of_minillm, 1)
    assert opened == [("prompts", True), ("text", True)]
    assert first == second != prompts


def check_frozen_prompt(layout):
    config = run_config("promptkd", 4, {})
    config = replace(config, promptkd=replace(config.promptkd, teacher_lr=0.0))
    method = METHODS["promptkd"](method_inputs(layout, config, PAIRS["gpt2"]), config, total_iters=TOTAL_ITERS)
    before = method.learner.soft_prompt.detach().clone()
    method.train(samples(), 1)
    assert torch.equal(method.learner.soft_prompt, before)


def test_a_prompt_of_learning_rate_zero_stays_as_it_is():
    run_distributed(check_frozen_prompt, 1)


def test_the_prompts_learning_rate_never_rises_towards_the_students_lowest():
    config = TrainingConfig(lr_decay_style="linear", min_lr=0.1)
    assert [learning_rate(i, lr=0.01, total_iters=10, config=config) for i in (1, 5, 10)] == pytest.approx([0.01] * 3)


def flags_read(layout, method_name):
    """Settings of these groups that a method looks at when it is made and in one iteration that writes."""
    config = run_config(method_name, 4, {})
    settings = replace(config.distillation, hidden_coef=0.5, kd_ratio=0.5 if method_name == "seqkd" else None)
    on_policy = replace(config.kd, on_policy_ratio=1.0 if method_name == "kd" else 0.0)
    config = replace(config, distillation=settings, kd=on_policy, minillm=replace(config.minillm, num_rollouts=8))
    parts, read = method_inputs(layout, config, PAIRS["gpt2"]), set()

    def get(self, name):
        read.add(name)
        return object.__getattribute__(self, name)

    for group in (DistillationConfig, KDConfig, DistiLLMConfig, PromptKDConfig, ResponsePrimingConfig, MiniLLMConfig, GenerationConfig):
        group.__getattribute__ = get
    minillm.open_responses = lambda *args, **options: text_batch()
    parts.student.method_parts.update(METHODS[method_name].modules(parts.student, parts.teacher, config))
    parts.text = METHODS[method_name].open_text(config, TOKENIZER, layout)
    method = METHODS[method_name](parts, config, total_iters=TOTAL_ITERS)
    for name, tensor in method.extra_tensors().items():
        if name == "threshold":
            tensor.fill_(1.0)  # DistiLLM's student writes
    method.train_iteration(Batches(global_batch, layout), 1)
    return read


@pytest.mark.parametrize("method_name", METHODS)
def test_a_method_reads_the_flags_that_are_called_its_own_and_no_others(method_name):
    config = Config(method=method_name)
    groups = (config.distillation, config.kd, config.distillm, config.promptkd, config.response_priming, config.minillm, config.generation)
    flags = {name for group in groups for name in vars(group)} - {"max_new_tokens", "num_generations", "rollout_engine", "vllm_gpu_memory_utilization"}  # trainer, loader and engine read them
    (read,) = run_distributed(flags_read, 1, method_name)
    assert read & flags == {name for name, methods in config.readers().items() if method_name in methods} & flags
