"""A teacher in a layout of its own teaches what one in the student's layout teaches, whatever the two layouts are."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from distributed import run_distributed
from oracle import StateDictSource
from stories import PAIRS, Batches, global_batch, text_batch
from test_methods import ENDS, TOKENIZER, TOTAL_ITERS, run_config
from test_trainer import CutOffError, command, numbers, write_inputs
from tiny import tiny_config, tiny_model

from megakd import trainer
from megakd.config import parse
from megakd.loading import align_vocabularies
from megakd.methods import METHODS
from megakd.methods.base import MethodInputs
from megakd.models.model_provider import build_model, load_weights, parameter_mappings
from megakd.optimizer import StudentOptimizer, without_a_student
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
    source.along(without_a_student)
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




@pytest.mark.parametrize("teacher", ["TP1", "TP2", "PP2"])
@pytest.mark.parametrize("student", STUDENTS)
def test_own_ranks(student, teacher):
    for method_name in FAMILIES:
        check(method_name, student, teacher, own=2)


# ---- whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("relayed"))


def run(layout, arguments, cut_off_before=None):
    """One run on this rank. The student's ranks are cut off before an iteration where that is asked for."""
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    iterate = trainer.Trainer._iterate

    def until(self):
        if self.iteration == cut_off_before:
            self.teacher.dismiss()  # a machine that goes away would take all ranks with it
            raise CutOffError
        iterate(self)

    trainer.Trainer._iterate = until
    with contextlib.suppress(CutOffError):
        trainer.train(parse(arguments))


OWN_RANK = {"teacher-ranks": 1, "hidden-dropout": 0}


def test_a_run_with_a_teacher_on_its_own_rank_is_continued_to_the_bit_and_says_what_one_without_says(inputs):
    run_distributed(run, 3, command(inputs, "own", "promptkd", **OWN_RANK))
    run_distributed(run, 3, command(inputs, "own-broken", "promptkd", **OWN_RANK), 4)  # iterations 1 to 3, the last checkpoint after 2
    run_distributed(run, 3, command(inputs, "own-broken", "promptkd", **OWN_RANK))
    assert numbers(inputs / "own-broken") == numbers(inputs / "own")
    run_distributed(run, 1, command(inputs, "alone", "promptkd", **{"hidden-dropout": 0}))
    for ours, theirs in zip(numbers(inputs / "own"), numbers(inputs / "alone"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    described = json.loads((inputs / "own/checkpoints/iter_0000004/megakd_checkpoint.json").read_text())
    assert described["teacher_layout"] == {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "data_parallel_size": 1}


def test_a_run_with_a_teacher_on_its_own_rank_goes_on_without_one(inputs):
    run_distributed(run, 2, command(inputs, "moved-in", "promptkd", **OWN_RANK), 3)
    run_distributed(run, 2, command(inputs, "moved-in", "promptkd", **{"teacher-tp": 2, "hidden-dropout": 0}))
    run_distributed(run, 1, command(inputs, "stayed", "promptkd", **{"hidden-dropout": 0}))
    for ours, theirs in zip(numbers(inputs / "moved-in"), numbers(inputs / "stayed"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
