"""KD that matches hidden states as well: one iteration equals float64 transformers at every layout, projection and all."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from distributed import run_distributed
from oracle import response_logits, step
from stories import global_batch, primed_batch, rows
from test_methods import (
    CONSTANT,
    ENDS,
    PAIRS,
    TOKENIZER,
    TOTAL_ITERS,
    StateDictSource,
    check_weights,
    oracle,
    run_config,
)
from tiny import tiny_config, tiny_model

from megakd.config import parse
from megakd.data.dataloader import split_across_dp
from megakd.loading import align_vocabularies
from megakd.methods import build_method
from megakd.models.model_provider import build_model, load_weights
from megakd.teachers.live import LiveTeacher

COEF, LAYERS = 0.7, (1, 2)  # of the student's two layers
LAYOUTS = [(1, 1, 1, False), (2, 1, 1, True), (1, 2, 1, False), (2, 2, 1, True), (1, 1, 2, True)]  # tp, pp, dp, SP or distributed


def method_of(layout, config, pair):
    specs = [tiny_config(**spec) for spec in pair]
    options = align_vocabularies([spec.vocab_size for spec in specs], layout.tp_size)
    options["sequence_parallel"] = config.parallel.sequence_parallel
    student, teacher = (build_model(spec, layout, **options) for spec in specs)
    for number, (model, spec) in enumerate(zip((student, teacher), specs), start=1):
        load_weights(model, StateDictSource(tiny_model(spec, seed=number)))
    return build_method(config, student, LiveTeacher(teacher.eval().requires_grad_(False)), TOKENIZER, ENDS, total_iters=TOTAL_ITERS)


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def hidden_at(model, layer, prompt, response):
    """[n, H] behind a layer, at the positions that predict the response."""
    kept = []
    hook = layers_of(model)[layer - 1].register_forward_hook(lambda _, __, out: kept.append(out[0] if isinstance(out, tuple) else out))
    response_logits(model, prompt, response)
    hook.remove()
    return kept[0].reshape(-1, kept[0].shape[-1])[len(prompt) - 1 : len(prompt) - 1 + len(response)]


def expected(reference, read, weights, distance, kd_ratio):
    """(loss/hidden, loss/total) and the update of student and projections, by torch's own AdamW."""
    student, teacher = reference.student, reference.teacher
    ratio = len(layers_of(teacher)) / len(layers_of(student))
    tokens = sum(len(y) for _, y, _ in read)
    kd = hidden = 0.0
    for x, y, z in read:
        log_q, log_p = reference.log_q(x, y), reference.log_p(z, y)
        kd = kd + (1 - kd_ratio) * reference.nll(x, y).sum() + kd_ratio * (log_p.exp() * (log_p - log_q)).sum()
        for k in LAYERS:
            q, p = hidden_at(student, k, x, y), hidden_at(teacher, round(k * ratio), z, y)
            q = q @ weights[k].t() if k in weights else q
            hidden = hidden + ((q - p).square().mean(-1) if distance == "mse" else 1 - F.cosine_similarity(q, p, dim=-1)).sum() / len(LAYERS)
    loss = (kd + COEF * hidden) / tokens
    loss.backward()
    every = [*student.parameters(), *weights.values()]
    torch.nn.utils.clip_grad_norm_(every, CONSTANT.clip)
    groups = [{"params": [p for p in every if p.ndim > 1]}, {"params": [p for p in every if p.ndim == 1], "weight_decay": 0.0}]
    step(CONSTANT.optimizer(groups), CONSTANT.rates[0])
    return float(hidden / tokens), float(loss)


def check_matching(layout, pair_name, distance, parallel, kd_ratio=0.5, batch=global_batch):
    config = run_config("kd", 2, parallel)
    settings = replace(config.distillation, hidden_coef=COEF, hidden_loss=distance, hidden_layers=LAYERS, kd_ratio=kd_ratio)
    config = replace(config, distillation=settings)
    pair = PAIRS[pair_name]
    method = method_of(layout, config, pair)
    mine = {int(name.rpartition("_")[2]): part.weight for name, part in method.student.method_parts.items()}
    parts = [{}] * layout.pp_size
    torch.distributed.all_gather_object(parts, {k: w.detach().double() for k, w in mine.items()}, group=layout.pp_group)
    weights = {k: w.requires_grad_() for part in parts for k, w in part.items()}
    assert set(weights) == (set(LAYERS) if pair_name == "gpt2" else set()), "a projection where the widths differ"
    got = method.train(split_across_dp(batch(), layout.dp_size)[layout.dp_rank], 1)
    reference = oracle(pair)
    hidden, total = expected(reference, rows(batch()), weights, distance, kd_ratio)
    assert got["loss/hidden"] == pytest.approx(hidden, rel=1e-6, abs=1e-6)
    assert got["loss/total"] == pytest.approx(total, rel=1e-6, abs=1e-6)
    check_weights(method.student, reference.student, pair_name)
    for k, weight in mine.items():
        assert (weight.double() - weights[k]).abs().max() <= 2e-6, f"projection of layer {k}"


@pytest.mark.parametrize("tp, pp, dp, split", LAYOUTS)
@pytest.mark.parametrize("pair_name, distance", [("gpt2", "mse"), ("llama", "cosine")])
def test_matching_hidden_states_equals_float64_transformers(pair_name, distance, tp, pp, dp, split):
    parallel = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": split and tp > 1,
        "use_distributed_optimizer": split and dp > 1,
    }
    run_distributed(check_matching, tp * pp * dp, pair_name, distance, parallel, tp=tp, pp=pp)


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 2)])
def test_hidden_states_of_a_teacher_that_reads_another_text_are_those_of_the_same_tokens(tp, pp):
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": tp > 1}
    run_distributed(check_matching, tp * pp, "gpt2", "mse", parallel, 0.5, primed_batch, tp=tp, pp=pp)


def test_hidden_states_are_matched_beside_cross_entropy_alone():
    """As in --method seqkd, whose usual --kd-ratio is 0."""
    run_distributed(check_matching, 1, "gpt2", "mse", {}, 0.0)


@pytest.mark.parametrize(
    "words, line",
    [
        ("--recompute", "--hidden-coef with --recompute: .* leave one of them out"),
        ("--reference-behaviour mean-of-means", "--hidden-coef is a token mean, which .* leave one of them out"),
        ("--hidden-coef -1", "--hidden-coef -1.0 must be at least 0"),
    ],
)
def test_what_does_not_go_with_matching_is_refused(words, line, capsys):
    flags = "--method kd --model m --teacher-model t --train-data d --save s --train-iters 1 --hidden-coef 0.5 "
    with pytest.raises(SystemExit):
        parse((flags + words).split())
    assert re.search(line, capsys.readouterr().err)
