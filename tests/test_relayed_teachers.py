"""A teacher in a layout of its own teaches what one in the student's layout teaches, whatever the two layouts are.

The whole table (slow; prints what travels):   OMP_NUM_THREADS=1 python -m pytest -s -m slow tests/test_relayed_teachers.py
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from oracle import StateDictSource
from safetensors.torch import load_file, save_file
from stories import PAIRS, Batches, global_batch, primed_batch, text_batch
from test_groups import refuse_global_state
from test_methods import ENDS, TOKENIZER, TOTAL_ITERS, run_config
from test_trainer import CutOffError, command, numbers, without_figures, write_inputs
from tiny import tiny_config, tiny_model

from megakd import trainer
from megakd.checkpointing.import_hf import hf_to_native
from megakd.checkpointing.native import write_latest
from megakd.config import parse
from megakd.errors import UserError
from megakd.loading import align_vocabularies
from megakd.methods import METHODS
from megakd.methods.base import MethodInputs
from megakd.models.model_provider import build_model, load_weights, parameter_mappings
from megakd.optimizer import StudentOptimizer, without_a_student
from megakd.runtime.initialize import initialize_apart, layout_over
from megakd.runtime.parallel_layout import Grid
from megakd.teachers import relay as relay_module
from megakd.teachers.live import LiveTeacher
from megakd.teachers.relayed import RelayedTeacher
from megakd.trainer import valid_losses

ITERATIONS = 2
FAMILIES = {"kd": "llama", "promptkd": "llama", "seqkd": "gpt2", "minillm": "llama"}  # llama's teacher has one key/value head
SHARED = {"TP1 DP4": (1, 1, 4), "TP2 DP2": (2, 1, 2), "PP2 DP2": (1, 2, 2), "TP2 PP2": (2, 2, 1)}  # of either model, on the same four ranks
STUDENTS = {"TP1": (1, 1, 1), "TP2": (2, 1, 1), "PP2": (1, 2, 1), "DP2": (1, 1, 2)}
TEACHERS = {"TP2": (2, 1, 1), "PP2": (1, 2, 1), "DP2": (1, 1, 2)}  # on two ranks of their own


def shared(student: str, teacher: str) -> tuple[Grid, Grid]:
    return Grid(0, *SHARED[student]), Grid(0, *SHARED[teacher])


def apart(student: str, teacher: str) -> tuple[Grid, Grid]:
    mine = Grid(0, *STUDENTS[student])
    return mine, Grid(mine.size, *TEACHERS[teacher])


def config_of(method: str, micro_batch_size: int):
    config = run_config(method, micro_batch_size, {})
    return replace(
        config,
        minillm=replace(config.minillm, num_rollouts=8, teacher_mixed_alpha=0.0),
        kd=replace(config.kd, on_policy_ratio=0.5),
        distillation=replace(config.distillation, kd_ratio=0.5),
    )


def stage(spec: dict, seed: int, layout, options: dict):
    """This rank's stage of a tiny model, with sequence parallelism where it has stages; None outside its layout."""
    if layout is None:
        return None
    model = build_model(tiny_config(**spec), layout, sequence_parallel=layout.pp_size > 1, **options)
    load_weights(model, StateDictSource(tiny_model(tiny_config(**spec), seed=seed)))
    return model


def method_on(layout, method_name, grids, *, micro_batch_size=1, before=lambda source: None):
    """The method, on a rank that has the student; and its teacher, who has served where it is all that the rank has."""
    apart = grids[0].first != grids[1].first
    places = initialize_apart(*grids) if apart else (layout, layout if grids[0] == grids[1] else layout_over(grids[1]))
    refuse_global_state()
    config, (one, other) = config_of(method_name, micro_batch_size), PAIRS[FAMILIES[method_name]]
    options = align_vocabularies([97, 97], *(grid.tp_size for grid in grids))
    student, teacher = stage(one, 1, places[0], options), stage(other, 2, places[1], options)
    if teacher is not None:
        teacher.eval().requires_grad_(False)
    source = LiveTeacher(teacher) if grids[0] == grids[1] else RelayedTeacher.between(grids, student, teacher)
    before(source)
    if student is None:
        source.serve()
        return None, source
    source.on_teacher_ranks(without_a_student)
    optimizer = StudentOptimizer(student, config.training, total_iters=TOTAL_ITERS, distributed=False)
    parts = MethodInputs(student, optimizer, source, TOKENIZER, ENDS, Batches(text_batch, student.layout))
    return METHODS[method_name](parts, config, total_iters=TOTAL_ITERS), source


def train(layout, method_name, grids, micro_batch_size=1):
    """What some iterations log, held-out losses, the prompt with its gradient, and the weights: of each what this rank has."""
    method, source = method_on(layout, method_name, grids, micro_batch_size=micro_batch_size)
    found = {}
    if method is not None:
        batches = Batches(primed_batch, method.layout)
        found["logged"] = [method.train_iteration(batches, 1 + i) for i in range(ITERATIONS)]
        found["valid"] = valid_losses(method, [*primed_batch(0), primed_batch(1)[0]])  # of four replicas, three have nothing left in the second pass
        found["prompt"] = {name: tensor.numpy() for name, tensor in method.extra_tensors().items()}
        found["weights"] = list(shards(method.student))
        source.shut_down()
    if hasattr(source.attached, "soft_prompt"):
        found["gradient"] = source.attached.soft_prompt.grad.numpy()
    found["sent"] = dict(source.relay.sent) if isinstance(source, RelayedTeacher) else {}
    return found


def shards(student):
    """Of each of this rank's parameters: its name, the axis and the ranges of the whole that are here, and what they hold."""
    tp_rank, tp_size = student.layout.tp_rank, student.layout.tp_size
    for param, mapping in parameter_mappings(student):
        axis = mapping.axis or 0
        size = param.shape[axis] * (1 if mapping.axis is None else tp_size)
        yield mapping.sources()[0].name, axis, mapping.ranges(size, tp_rank, tp_size), param.detach().numpy()


@cache
def on_one_rank(method_name):
    """The same on one rank, with a live teacher."""
    one = Grid(0, 1, 1, 1)
    return run_distributed(train, 1, method_name, (one, one))[0]


def check(method_name, grids, micro_batch_size=1) -> Counter:
    """Every rank says what one rank says; returns what has travelled."""
    (student, teacher), expected, kinds = grids, on_one_rank(method_name), Counter()
    layout = {} if student.first != teacher.first else {"tp": student.tp_size, "pp": student.pp_size}
    sent = Counter()
    ranks = max(grid.first + grid.size for grid in grids)
    for rank in run_distributed(train, ranks, method_name, grids, micro_batch_size, **layout):
        kinds.update(rank.keys())
        sent.update(rank["sent"])
        for mine, one in zip(rank.get("logged", expected["logged"]), expected["logged"], strict=True):
            names = [name for name in one if name.startswith(("loss", "grad_norm", "tokens"))]
            assert {name: mine[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-6, abs=1e-6)
        assert rank.get("valid", expected["valid"]) == pytest.approx(expected["valid"], rel=1e-6)
        for name, values in rank.get("prompt", {}).items():
            assert abs(values - expected["prompt"][name]).max() <= 1e-6, name
        assert abs(rank.get("gradient", 0) - expected.get("gradient", 0)).max() <= 1e-6 if "gradient" in rank else True
        check_weights(rank.get("weights", []), expected["weights"])
    assert kinds["weights"] == student.size and kinds["gradient"] == (teacher.size if method_name == "promptkd" else 0)
    return sent


def check_weights(mine, expected):
    whole = {name: values for name, _, _, values in expected}
    for name, axis, ranges, values in mine:
        wanted = np.concatenate([whole[name].take(range(lo, hi), axis) for lo, hi in ranges], axis)
        assert abs(values - wanted).max() <= 1e-6, name


@pytest.fixture(autouse=True)
def narrow_windows(monkeypatch):
    """So narrow that an iteration has several."""
    monkeypatch.setattr(relay_module, "WINDOW", 1)


TABLE = {f"{student} taught by {teacher}": shared(student, teacher) for student in SHARED for teacher in SHARED if student != teacher}
TABLE |= {f"{student} taught by {teacher} on its own ranks": apart(student, teacher) for student in STUDENTS for teacher in TEACHERS}
SELECTED = {
    "kd": ["TP1 DP4 taught by TP2 PP2", "PP2 taught by TP2 on its own ranks"],
    "promptkd": ["PP2 DP2 taught by TP2 DP2", "DP2 taught by PP2 on its own ranks"],
    "seqkd": ["DP2 taught by TP2 on its own ranks"],
    "minillm": ["TP2 PP2 taught by TP1 DP4"],
}


@pytest.mark.parametrize("method_name, row", [(method_name, row) for method_name, rows in SELECTED.items() for row in rows])
def test_a_teacher_in_its_own_layout_teaches_the_same(method_name, row):
    check(method_name, TABLE[row])


def test_a_replica_of_the_teacher_may_have_nothing_to_read():
    check("promptkd", TABLE["TP1 taught by DP2 on its own ranks"], micro_batch_size=8)


@pytest.mark.slow
@pytest.mark.parametrize("row", TABLE)
def test_the_whole_table(row):
    for method_name in FAMILIES:
        sent = check(method_name, TABLE[row])
        travelled = ", ".join(f"{kind} {sent[kind] / sent['tokens']:,.1f}" for kind in ("ids", "rows", "head"))
        print(f"{row:45} {method_name:9} bytes a token: {travelled}", flush=True)


# ---- what travels, and what is kept


def watched(layout, grids, rows):
    """One kd iteration over so many rows: the most received micro-batches that a rank has had at once, and the bytes that left it."""
    alive = Counter()

    def watch(source):
        empty = source.relay._empty

        def counted(*arguments):
            tensor = empty(*arguments)
            alive["now"] += 1
            alive["most"] = max(alive["most"], alive["now"])
            weakref.finalize(tensor, lambda: alive.subtract(["now"]))
            return tensor

        source.relay._empty = counted

    method, source = method_on(layout, "kd", grids, before=watch)
    if method is not None:
        samples = [replace(sample, sample_id=i) for i, sample in enumerate(global_batch(0) * (rows // 8))]
        mine = samples[method.layout.dp_rank :: method.layout.dp_size]
        method.learn(mine, 1, kd_ratio=0.5)
        source.shut_down()
    return alive["most"], source.relay.sent


@pytest.mark.parametrize("grids, most", [(apart("TP2", "DP2"), 2), (shared("TP2 DP2", "TP1 DP4"), 1), (shared("PP2 DP2", "TP2 PP2"), 2)])
def test_rows_are_kept_of_micro_batches_in_flight_whatever_the_global_batch(grids, most):
    for rows in (8, 32):
        layout = {} if grids[1].first else {"tp": grids[0].tp_size, "pp": grids[0].pp_size}
        found = run_distributed(watched, 4, grids, rows, **layout)
        assert max(kept for kept, _ in found) == most


def test_of_each_token_one_hidden_state_travels_to_each_rank_of_the_students_last_stage():
    found = run_distributed(watched, 4, apart("TP2", "DP2"), 8)
    sent = sum((sent for _, sent in found), Counter())
    tokens = sum(len(sample.response) for sample in global_batch(0))
    positions = sum(sample.num_positions for sample in global_batch(0))
    assert sent["tokens"] == tokens
    assert sent["rows"] == 2 * tokens * 64 * 4, "float32, hidden size 64, to both ranks of the student"
    assert sent["ids"] == positions * 8, "tokens and labels, which all ranks get"
    assert sent["head"] == 2 * 64 * 64 * 4, "of 128 rows each rank has a half"


# ---- whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("relayed"))


def run(layout, arguments, cut_off_before=None):
    """One run on this rank. The student's ranks are cut off before an iteration where that is asked for."""
    os.environ["WORLD_SIZE"] = str(torch.distributed.get_world_size())
    iterate = trainer.Trainer._iterate
    without_figures()

    def until(self):
        if self.iteration == cut_off_before:
            self.teacher.shut_down()  # a machine that goes away would take all ranks with it
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


def nan_in_the_second_half(root: Path, layer: int = 0) -> None:
    """Of a weight that each of two ranks has half of."""
    file = root / "student" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"transformer.h.{layer}.mlp.c_proj.weight"][-1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def a_checkpoint_without_optimizer(root: Path) -> None:
    shutil.rmtree(root / "run" / "checkpoints")
    hf_to_native(root / "student", root / "run" / "checkpoints", tp=2, pp=1, verify=False)
    target = root / "run" / "checkpoints" / "iter_0000002"
    (root / "run" / "checkpoints" / "iter_0000000").rename(target)
    write_latest(target.parent, 2)


def no_file_for_the_settings(root: Path) -> None:
    (root / "run" / "config.yaml").mkdir(parents=True)
    (root / "run" / "megakd.json").write_text('{"made_by": "pretrain_kd.py"}')


def refused(layout, arguments) -> str:
    with pytest.raises(UserError) as error:
        run(layout, arguments)
    return str(error.value)


def refused_or_dismissed(layout, arguments) -> str:
    return refused(layout, arguments) if dist.get_rank() < 2 else run(layout, arguments) or "dismissed"


@pytest.mark.parametrize("damage, who, said", [
    (nan_in_the_second_half, refused, "model.safetensors: transformer.h.0.mlp.c_proj.weight holds NaN"),
    (a_checkpoint_without_optimizer, refused_or_dismissed, "holds no optimizer state to resume from"),
    (no_file_for_the_settings, refused_or_dismissed, "config.yaml"),
])  # fmt: skip
def test_an_error_of_the_students_ranks_is_heard_by_the_teachers_own(damage, who, said, tmp_path):
    """From Python too, where nobody ends the process; the student's second rank alone meets the first, its first alone the last."""
    root = write_inputs(tmp_path)
    arguments = command(root, "run", "kd", **OWN_RANK, **{"tp": 2, "teacher-tp": 1})
    if damage is a_checkpoint_without_optimizer:
        run_distributed(run, 3, arguments, 3)
    damage(root)
    found = run_distributed(who, 3, arguments, timeout=100)
    assert found[0] == found[1] and said in found[0], found
    assert found[2] == (found[0] if who is refused else "dismissed")


def test_what_one_stage_cannot_load_is_told_on_all_before_the_teacher_is_made(tmp_path):
    """Its stages, whose embeddings are tied, would wait for each other."""
    root = write_inputs(tmp_path)
    nan_in_the_second_half(root, layer=1)
    found = run_distributed(refused, 2, command(root, "run", "kd", pp=2), pp=2, timeout=60)
    assert found[0] == found[1] and "h.1.mlp.c_proj.weight holds NaN" in found[0], found
