"""A student with adapters that is its own teacher: the same numbers as from a copy of its folder, and no weight twice."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from distributed import run_distributed
from oracle import StateDictSource
from stories import primed_batch
from test_methods import ENDS, TOKENIZER, TOTAL_ITERS, run_config
from test_self_distillation import SPECS
from test_trainer import command, inputs, numbers, run  # noqa: F401  a fixture
from tiny import tiny_config, tiny_model

from megakd import trainer
from megakd.checkpointing.native import NativeCheckpoint
from megakd.config import LoRAConfig, from_flags
from megakd.config.train import Config
from megakd.errors import UserError
from megakd.loading import align_vocabularies
from megakd.methods import METHODS
from megakd.methods.base import MethodInputs
from megakd.models.lora import ALL_LINEAR, adapt
from megakd.models.model_provider import build_model, load_weights
from megakd.models.shared_weights import with_adapters_of_its_own, without_adapters
from megakd.optimizer import StudentOptimizer
from megakd.teachers.live import LiveTeacher
from megakd.teachers.moving_average import MovingAverage

ADAPTED = {"lora-rank": 4, "lora-target-modules": ALL_LINEAR, "teacher-model": "self"}
ADAPTERS = ".adapters."


def kd_of_itself(layout, family, parallel, teacher_of):
    """KD, reverse KL alone, of a student with adapters, taught by what `teacher_of` makes of it; its weights as well."""
    config, spec = run_config("kd", 2, parallel), tiny_config(**SPECS[family])
    config = replace(config, distillation=replace(config.distillation, kd_objective="reverse_kl", kd_ratio=1.0))
    options = align_vocabularies([spec.vocab_size], layout.tp_size) | {"sequence_parallel": config.parallel.sequence_parallel}
    student = build_model(spec, layout, **options)
    load_weights(student, StateDictSource(tiny_model(spec, seed=1)))
    adapt(student, LoRAConfig(lora_rank=4, lora_target_modules=(ALL_LINEAR,)), seed=3)
    teacher = teacher_of(student)
    optimizer = StudentOptimizer(student, config.training, total_iters=TOTAL_ITERS, distributed=False)
    return METHODS["kd"](MethodInputs(student, optimizer, teacher, TOKENIZER, ENDS), config, total_iters=TOTAL_ITERS)


def taught_by_itself(layout, family, parallel):
    method = kd_of_itself(layout, family, parallel, lambda student: LiveTeacher(without_adapters(student)))
    weights = {id(weight) for weight in method.student.parameters()}
    shared = all(id(weight) in weights and not weight.requires_grad for weight in method.teacher.model.parameters())
    names = [name for name, _ in method.teacher.model.named_parameters()]
    distances = [method.train(primed_batch(i), i + 1)["loss/reverse_kl"] for i in range(3)]
    same = method.train([replace(sample, teacher_prompt=None) for sample in primed_batch(0)], 4)["loss/reverse_kl"]
    return shared, names, distances, same


@pytest.mark.parametrize("family, tp, pp, sp", [("gpt2", 1, 1, False), ("llama", 2, 2, True)])
def test_the_teacher_has_the_students_weights_and_no_adapters(family, tp, pp, sp):
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": sp}
    for shared, names, distances, same in run_distributed(taught_by_itself, tp * pp, family, parallel, tp=tp, pp=pp):
        assert shared and names and not [name for name in names if ADAPTERS in name]
        assert len(set(distances)) == 3 and same > 1e-6, "adapters have moved the student away from it"


def distance_at_the_start(layout, parallel):
    method = kd_of_itself(layout, "llama", parallel, lambda student: LiveTeacher(without_adapters(student)))
    metrics = method.train([replace(sample, teacher_prompt=None) for sample in primed_batch(0)], 1)
    return metrics["loss/reverse_kl"], metrics["grad_norm"]


def test_before_a_step_there_is_nothing_between_them():
    assert run_distributed(distance_at_the_start, 2, {"tensor_model_parallel_size": 2}, tp=2) == [(0.0, 0.0)] * 2


METHOD_FLAGS = {
    "kd": {"on-policy-ratio": 0.5, "seed": 1, "hidden-coef": 0.5},
    "promptkd": {"recompute": True},
    "minillm": {"num-rollouts": 8, "ppo-epochs": 2, "teacher-mixed-alpha": 0.2, "recompute": True},
}


@pytest.mark.parametrize("method", METHOD_FLAGS)
def test_a_run_logs_the_same_as_beside_a_copy(inputs, method):  # noqa: F811
    """Dropout, recomputation and sequence parallelism of the one do not reach the other."""
    shutil.copytree(inputs / "student", inputs / "copy", dirs_exist_ok=True)
    flags = METHOD_FLAGS[method] | ADAPTED | {"sequence-parallel": True, "tp": 2, "train-iters": 2}
    run_distributed(run, 2, command(inputs, f"{method}-shared", method, **flags), tp=2)
    run_distributed(run, 2, command(inputs, f"{method}-copied", method, **flags | {"teacher-model": inputs / "copy"}), tp=2)
    assert numbers(inputs / f"{method}-shared") == numbers(inputs / f"{method}-copied")


def weights_held(layout, arguments: list[str]) -> tuple[int, int]:
    """Numbers that student and teacher hold together, each counted once, and those of the student."""
    found, make = [], trainer.build_teacher

    def seen(config, folders, grids, student, models, first):
        tensors = lambda *of: {weight.data_ptr(): weight.numel() for model in of for weight in model.parameters()}
        found.append((sum(tensors(student, *models).values()), sum(tensors(student).values())))
        return make(config, folders, grids, student, models, first)

    trainer.build_teacher = seen
    run(layout, arguments)
    return found[0]


def test_a_run_holds_no_weight_twice(inputs):  # noqa: F811
    shutil.copytree(inputs / "student", inputs / "copy", dirs_exist_ok=True)
    flags = ADAPTED | {"train-iters": 1, "valid-data": ""}
    ((together, alone),) = run_distributed(weights_held, 1, command(inputs, "once", "kd", **flags))
    assert together == alone
    ((together, alone),) = run_distributed(weights_held, 1, command(inputs, "twice", "kd", **flags | {"teacher-model": inputs / "copy"}))
    assert together > 1.9 * alone


def averaged(layout, decay: float):
    """The average of the adapters after three steps beside float64's, of the student's adapters after each."""
    method = kd_of_itself(layout, "llama", {}, lambda student: MovingAverage(with_adapters_of_its_own(student), decay))
    trained = {name: weight for name, weight in method.student.named_parameters() if weight.requires_grad}
    expected = {name: weight.detach().double().clone() for name, weight in trained.items()}
    base = {name: weight.detach().clone() for name, weight in method.student.named_parameters() if name not in trained}
    for iteration in range(1, 4):
        method.train(primed_batch(iteration), iteration)
        for name, weight in trained.items():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach().double()
    for name, weight in method.teacher.model.named_parameters():
        exact = expected.get(name, base.get(name))
        torch.testing.assert_close(weight.double(), exact.double(), rtol=1e-5, atol=1e-8)
    return sorted(method.teacher.weights_to_save()) == sorted(trained), max(float((expected[n] - w.double()).abs().max()) for n, w in trained.items())


def test_an_average_of_adapters_is_float64s_and_nothing_else_is_kept():
    ((adapters_alone, apart),) = run_distributed(averaged, 1, 0.5)
    assert adapters_alone and apart > 1e-5


def test_a_run_with_averaged_adapters_goes_on_with_the_same_numbers(inputs):  # noqa: F811
    flags = ADAPTED | {"teacher-ema": 0.5, "teacher-priming": "Think first.", "max-length": 20, "max-prompt-length": 12}
    run_distributed(run, 2, command(inputs, "ema-unbroken", "kd", **flags), tp=2)
    run_distributed(run, 2, command(inputs, "ema-broken", "kd", **flags), 4, tp=2)
    run_distributed(run, 2, command(inputs, "ema-broken", "kd", **flags), tp=2)
    assert numbers(inputs / "ema-broken") == numbers(inputs / "ema-unbroken")
    kept = [key for key in NativeCheckpoint(inputs / "ema-broken" / "checkpoints").keys if key.startswith("teacher.")]
    assert kept and all(ADAPTERS in key for key in kept)


@pytest.mark.parametrize(
    "flags, shares",
    [
        ({}, True),
        ({"teacher-model": "student"}, False),
        ({"teacher-quantize": "int8"}, False),
        ({"teacher-offload": True}, False),
        ({"teacher-tp": 2}, False),
        ({"reference-behaviour": "teacher-dropout"}, False),
    ],
)
def test_who_is_elsewhere_or_another_has_weights_of_its_own(flags, shares):
    words = [str(word) for name, value in (ADAPTED | flags).items() for word in (f"--{name}", *([] if value is True else [value]))]
    assert from_flags(["--method", "kd", "--model", "m", *words], Config()).teacher_shares_weights is shares
    if "reference-behaviour" in flags:
        with pytest.raises(UserError, match=r"--teacher-ema 0.5 with --lora-rank 4: such a teacher has no dropout; leave teacher-dropout out"):
            required = ["--train-data", "t", "--save", "s", "--train-iters", "1", "--teacher-ema", "0.5"]
            from_flags(["--method", "kd", "--model", "m", *words, *required], Config()).check()
