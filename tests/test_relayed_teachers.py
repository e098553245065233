"""A teacher in a layout of its own teaches what one in the student's layout teaches, whatever the two layouts are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from distributed import run_distributed
from oracle import StateDictSource
from stories import PAIRS, Batches, global_batch, text_batch
from test_methods import ENDS, TOKENIZER, TOTAL_ITERS, run_config
from tiny import tiny_config, tiny_model

from megakd.loading import align_vocabularies
from megakd.methods import METHODS
from megakd.methods.base import MethodInputs
from megakd.models.model_provider import build_model, load_weights, parameter_mappings
from megakd.optimizer import StudentOptimizer
from megakd.runtime.initialize import initialize_apart, layout_over
from megakd.runtime.parallel_layout import Grid
from megakd.teachers.live import LiveTeacher
from megakd.teachers.relayed import RelayedTeacher

STUDENTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "DP2": (1, 1)}
TEACHERS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "TP2 PP2": (2, 2)}
WORLD, ITERATIONS = 4, 2
FAMILIES = {"kd": "llama", "promptkd": "llama", "seqkd": "gpt2", "minillm": "llama"}


def grids_of(student: str, teacher: str, own: int) -> tuple[Grid, Grid]:
    """`own` ranks are the teacher's alone; the others are the student's, and without any all are both's. What TP × PP leaves is DP."""
    over = lambda first, ranks, tp, pp: Grid(first, tp, pp, ranks // (tp * pp))
    return over(0, WORLD - own, *STUDENTS[student]), over(WORLD - own if own else 0, own or WORLD, *TEACHERS[teacher])


def config_of(method: str, parallel: dict):
    config = run_config(method, 1, parallel)
    return replace(
        config,
        minillm=replace(config.minillm, num_rollouts=8, teacher_mixed_alpha=0.0),
        kd=replace(config.kd, on_policy_ratio=0.5),
        distillation=replace(config.distillation, kd_ratio=0.5),
    )


def stage(spec: dict, seed: int, layout, options: dict):
    """This rank's stage of a tiny model, or None outside its layout."""
    if layout is None:
        return None
    model = build_model(tiny_config(**spec), layout, **options)
    load_weights(model, StateDictSource(tiny_model(tiny_config(**spec), seed=seed)))
    return model


def train(layout, student_layout, teacher_layout, method_name, grids):
    """What some iterations log, the prompt's gradient, and the weights; of a rank that has the student."""
    config = config_of(method_name, {"use_distributed_optimizer": False})
    specs = PAIRS[FAMILIES[method_name]]
    options = align_vocabularies([97, 97], *(grid.tp_size for grid in grids))
    student = stage(specs[0], 1, student_layout, options)
    teacher = stage(specs[1], 2, teacher_layout, options)
    if teacher is not None:
        teacher.eval().requires_grad_(False)
    relayed = grids[0] != grids[1]
    source = RelayedTeacher.between(grids, student, teacher) if relayed else LiveTeacher(teacher)
    if student is None:
        source.serve()
        return None
    optimizer = StudentOptimizer(student, config.training, total_iters=TOTAL_ITERS, distributed=False)
    parts = MethodInputs(student, optimizer, source, TOKENIZER, ENDS, Batches(text_batch, student_layout))
    method = METHODS[method_name](parts, config, total_iters=TOTAL_ITERS)
    logged = [method.train_iteration(Batches(global_batch, student_layout), 1 + i) for i in range(ITERATIONS)]
    valid = method.evaluate(Batches(global_batch, student_layout).samples(0))
    valid = (student_layout.sum_over_data_parallel(valid)).tolist()
    state = {name: tensor.numpy() for name, tensor in method.extra_tensors().items()}
    sent = dict(source.relay.sent) if relayed else {}
    source.dismiss()
    return {"logged": logged, "valid": valid, "state": state, "weights": list(shards(student)), "sent": sent}


def shards(student):
    """Of each of this rank's parameters: its name, the axis and the ranges of the whole that are here, and what they hold."""
    tp_rank, tp_size = student.layout.tp_rank, student.layout.tp_size
    for param, mapping in parameter_mappings(student):
        axis = mapping.axis or 0
        size = param.shape[axis] * (1 if mapping.axis is None else tp_size)
        yield mapping.sources()[0].name, axis, mapping.ranges(size, tp_rank, tp_size), param.detach().numpy()


def on_ranks(layout, method_name, grids):
    student, teacher = grids
    if student.first == teacher.first:
        return train(layout, layout, layout_over(teacher) if teacher != student else layout, method_name, grids)
    return train(layout, *initialize_apart(*grids), method_name, grids)


@cache
def on_one_rank(method_name):
    """The same on one rank, with a live teacher."""
    one = Grid(0, 1, 1, 1)
    return run_distributed(on_ranks, 1, method_name, (one, one))[0]


def check(method_name, student, teacher, own=0):
    expected, grids = on_one_rank(method_name), grids_of(student, teacher, own)
    tp, pp = STUDENTS[student]
    found = [rank for rank in run_distributed(on_ranks, WORLD, method_name, grids, tp=1 if own else tp, pp=1 if own else pp) if rank]
    for rank in found:
        for mine, one in zip(rank["logged"], expected["logged"], strict=True):
            names = [name for name in one if name.startswith(("loss", "grad_norm", "tokens"))]
            assert {name: mine[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=2e-6, abs=1e-6)
        assert rank["valid"] == pytest.approx(expected["valid"], rel=1e-6)
        assert rank["state"].keys() == expected["state"].keys()
        for name, values in rank["state"].items():
            assert abs(values - expected["state"][name]).max() <= 1e-6, name
        whole = {name: values for name, _, _, values in expected["weights"]}
        for name, axis, ranges, values in rank["weights"]:
            wanted = np.concatenate([whole[name].take(range(lo, hi), axis) for lo, hi in ranges], axis)
            assert abs(values - wanted).max() <= 1e-6, name
    return found


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("student", STUDENTS)
def test_shared_ranks(student, teacher):
    for method_name in FAMILIES:
        check(method_name, student, teacher)
