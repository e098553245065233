"""The student as its own teacher, with another text, frozen or as a moving average; and runs with a primed teacher from end to end."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import stories
import torch
from distributed import run_distributed
from oracle import Oracle, StateDictSource
from stories import global_batch, primed_batch
from test_methods import CONSTANT, ENDS, TOKENIZER, TOTAL_ITERS, check_weights, run_config
from test_trainer import command, inputs, numbers, run  # noqa: F401  a fixture
from tiny import tiny_config, tiny_folder, tiny_model
from transformers import AutoTokenizer

from megakd.checkpointing.native import NativeCheckpoint
from megakd.checkpointing.reshard import reshard
from megakd.config import parse
from megakd.data.dataloader import split_across_dp
from megakd.loading import align_vocabularies
from megakd.methods import METHODS
from megakd.methods.base import MethodInputs
from megakd.models.model_provider import build_model, load_weights
from megakd.optimizer import StudentOptimizer
from megakd.teachers.live import LiveTeacher
from megakd.teachers.moving_average import MovingAverage

SPECS = {"gpt2": {"family": "gpt2", "layers": 2}, "llama": {"family": "llama", "layers": 2}}


def kd_of_itself(layout, spec, parallel, make_teacher=LiveTeacher):
    """KD, reverse KL alone, of a student whose teacher begins as it does."""
    config, spec = run_config("kd", 2, parallel), tiny_config(**spec)
    config = replace(config, distillation=replace(config.distillation, kd_objective="reverse_kl", kd_ratio=1.0))
    options = align_vocabularies([spec.vocab_size], layout.tp_size) | {"sequence_parallel": config.parallel.sequence_parallel}
    student, teacher = (build_model(spec, layout, **options) for _ in range(2))
    for model in (student, teacher):
        load_weights(model, StateDictSource(tiny_model(spec, seed=1)))
    optimizer = StudentOptimizer(student, config.training, total_iters=TOTAL_ITERS, distributed=False)
    parts = MethodInputs(student, optimizer, make_teacher(teacher.eval().requires_grad_(False)), TOKENIZER, ENDS)
    return METHODS["kd"](parts, config, total_iters=TOTAL_ITERS)


def distances(layout, spec, parallel):
    """Of the same text, and of another one."""
    return [kd_of_itself(layout, spec, parallel).train(batch(0), 1) for batch in (global_batch, primed_batch)]


@pytest.mark.parametrize("family, tp, pp, sp", [("gpt2", 1, 1, False), ("llama", 2, 1, False), ("gpt2", 1, 2, False), ("llama", 2, 2, True)])
def test_who_is_its_own_teacher_and_reads_the_same_learns_nothing(family, tp, pp, sp):
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": sp}
    for same, other in run_distributed(distances, tp * pp, SPECS[family], parallel, tp=tp, pp=pp):
        assert (same["loss/reverse_kl"], same["grad_norm"]) == (0.0, 0.0)
        assert other["loss/reverse_kl"] > 1e-3 and other["grad_norm"] > 1e-3


def check_average(layout, spec, parallel, decay):
    """Three steps of both: losses, the student, and the teacher after each."""
    method = kd_of_itself(layout, spec, parallel, lambda model: MovingAverage(model, decay))
    reference = Oracle(*(tiny_model(tiny_config(**spec), seed=1) for _ in range(2)), CONSTANT)
    for number in range(3):
        got = method.train(split_across_dp(primed_batch(number), layout.dp_size)[layout.dp_rank], number + 1)
        want = reference.kd(stories.rows(primed_batch(number)), 1.0, "reverse_kl")
        for name in ("loss/reverse_kl", "grad_norm"):
            assert got[name] == pytest.approx(float(want[name]), rel=3e-6, abs=1e-6), (number, name)
        with torch.no_grad():
            for average, weight in zip(reference.teacher.parameters(), reference.student.parameters()):
                average.copy_(decay * average + (1 - decay) * weight)
        check_weights(method.student, reference.student.state_dict(), number)
        check_weights(method.teacher.model, reference.teacher.state_dict(), number)


@pytest.mark.parametrize("tp, pp, dp, sp", [(1, 1, 1, False), (2, 1, 1, False), (1, 2, 1, False), (2, 2, 1, True), (1, 1, 2, False)])
def test_a_teacher_that_averages_the_student_equals_float64_transformers(tp, pp, dp, sp):
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": sp}
    run_distributed(check_average, tp * pp * dp, SPECS["gpt2" if tp == pp else "llama"], parallel, 0.7, tp=tp, pp=pp)


def test_an_average_of_16_bit_weights_is_kept_in_float32():
    """A hundredth of a step is below bfloat16's spacing: rounded each time, the average would never move."""
    teacher, student = (torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16).requires_grad_(False) for _ in range(2))
    teacher.weight.fill_(1.0)
    student.weight.fill_(1.125)
    average = MovingAverage(teacher, 0.99)
    for _ in range(100):
        average.after_step(student)
    expected = 1.125 - 0.125 * 0.99**100
    assert average.average["weight"].item() == pytest.approx(expected, rel=1e-5)
    assert teacher.weight.item() == torch.tensor(expected).bfloat16().item()


# ---- whole runs

SELF = {"teacher-model": "self", "teacher-ema": 0.9, "teacher-priming": "Think first.", "kd-objective": "reverse_kl"}
RUNS = {
    "a moving average, a soft prompt, bfloat16": (
        "promptkd",
        {"model": "llama", "dtype": "bf16", "teacher-model": "self", "teacher-ema": 0.5, "teacher-prompt-field": "response"},
    ),
    "gradient descent": ("response_priming", {"optimizer": "sgd", "momentum": 0.8, "lr": 1e-2, "teacher-prompt-field": "response"}),
    "a primed teacher and old answers": ("distillm", {"teacher-priming": "Think first.", "lr": 0.05, "eval-interval": 1, "seed": 7}),
}
ROOM = {"max-length": 20, "max-prompt-length": 12}


def llama(root):
    """A student with a gated feed-forward layer and tied heads, beside those of the fixture."""
    tokenizer = AutoTokenizer.from_pretrained(root / "student")
    folder = tiny_folder(root / "llama", "llama", layers=2, vocab_size=len(tokenizer), tie_word_embeddings=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_run_cut_off_and_continued_logs_the_same_numbers(inputs, name):  # noqa: F811
    method, flags = RUNS[name]
    if flags.get("model") == "llama":
        flags = flags | {"model": llama(inputs)}
    unbroken, broken = (f"{re.sub('[^a-z]', '', name)}-{part}" for part in ("unbroken", "broken"))
    run_distributed(run, 2, command(inputs, unbroken, method, **flags, **ROOM), tp=2)
    run_distributed(run, 2, command(inputs, broken, method, **flags, **ROOM), 4, tp=2)  # iterations 1 to 3, a checkpoint after 2
    run_distributed(run, 2, command(inputs, broken, method, **flags, **ROOM), tp=2)
    assert numbers(inputs / broken) == numbers(inputs / unbroken)


def test_an_average_goes_on_at_another_layout_and_is_resharded(inputs, tmp_path):  # noqa: F811
    flags = SELF | ROOM | {"hidden-dropout": 0}
    run_distributed(run, 2, command(inputs, "average", "kd", **flags, tp=2), tp=2)
    run_distributed(run, 2, command(inputs, "average-moved", "kd", **flags, tp=2), 3, tp=2)
    run_distributed(run, 2, command(inputs, "average-moved", "kd", **flags, pp=2), pp=2)
    for ours, theirs in zip(numbers(inputs / "average-moved"), numbers(inputs / "average"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-4, abs=2e-5)
    reshard(inputs / "average" / "checkpoints", tmp_path / "pp2", tp=1, pp=2)
    before, after = NativeCheckpoint(inputs / "average" / "checkpoints"), NativeCheckpoint(tmp_path / "pp2")
    kept = [key for key in before.keys if key.startswith("teacher.")]
    assert kept and kept == [key for key in after.keys if key.startswith("teacher.")]


def test_an_empty_priming_is_none_to_the_bit(inputs, tmp_path):  # noqa: F811
    question = tmp_path / "question.jinja"
    question.write_text("{{ question }}")
    flags = {"on-policy-ratio": 0.5, "seed": 7, "train-iters": 2}  # the student writes in the first
    for save, priming in {"none": "none", "empty": "", "question": question, "primed": "Think first."}.items():
        run_distributed(run, 1, command(inputs, f"priming-{save}", "kd", **flags, **ROOM, **{"teacher-priming": priming}))
    logged = {save: numbers(inputs / f"priming-{save}") for save in ("none", "empty", "question", "primed")}
    assert logged["none"] == logged["empty"] == logged["question"] != logged["primed"]
    weights = [(inputs / f"priming-{save}" / "hf" / "model.safetensors").read_bytes() for save in logged]
    assert weights[0] == weights[1] == weights[2] != weights[3]


def printed(layout, arguments, file):
    with open(file, "w") as out, contextlib.redirect_stdout(out):
        run(layout, arguments)


def test_show_data_prints_rows_as_they_are_read_and_leaves_nothing(inputs, tmp_path):  # noqa: F811
    words = command(inputs, "shown", "promptkd", **ROOM, **{"show-data": 2, "teacher-priming": "Think."})
    run_distributed(printed, 1, words, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert re.findall(r"^\S+ line (\d+), the loss is on", said, re.M) == ["1", "2"]
    assert said.count("⟦what the student writes, 8 tokens at most⟧") == 4 and "    | Think. " in said
    assert not (inputs / "shown").exists()
    words = command(inputs, "primed", "seqkd", **ROOM, **{"train-iters": 1, "teacher-priming": "Think."})
    run_distributed(printed, 1, words, tmp_path / "run")
    assert (tmp_path / "run").read_text().count("⟦what the teacher writes, 8 tokens at most⟧") == 2, "the first row of a primed run"


@pytest.mark.parametrize(
    "words, line",
    [
        ("--method kd --teacher-model t --teacher-ema 0.9", "--teacher-ema 0.9 is an average of the student, and --teacher-model t another model; give"),
        ("--method seqkd --teacher-model self --teacher-ema 0.9", "--teacher-ema 0.9: --method seqkd keeps what its teacher said over many steps;"),
        ("--method minillm --teacher-model self --teacher-ema 0.9", "--teacher-ema 0.9: --method minillm keeps what its teacher said over many steps;"),
        ("--method kd --teacher-model self --teacher-ema 1", "--teacher-ema 1.0 must be at least 0 and below 1"),
        ("--method kd --teacher-model t --optimizer sgd --use-distributed-optimizer", "--use-distributed-optimizer splits AdamW's moments, which"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(words, line, capsys):
    with pytest.raises(SystemExit):
        parse(["--model", "m", "--train-data", "d", "--save", "s", "--train-iters", "1", *words.split()])
    assert f"error: {line}" in capsys.readouterr().err


def test_a_teacher_that_stays_as_it_began_follows_nobody():
    teacher = LiveTeacher(SimpleNamespace(layout=None))
    teacher.after_step(None)
    assert teacher.weights_to_save() == {}
