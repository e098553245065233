"""The benchmark times equal work only, says where the time goes, and leaves a CSV and a figure."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
from distributed import run_distributed
from megakd_benchmarks import generation_parts, hf_system, measuring, run
from megakd_benchmarks.generation_parts import Account, now, totals
from megakd_benchmarks.hf_system import HFSystem, left_padded
from megakd_benchmarks.measuring import MIB, PARTS, check_equal, peak_in_own_process
from megakd_benchmarks.megakd_system import MegakdSystem
from megakd_benchmarks.workload import PositionCounter, flops_of_iteration, make_workload, model_configs, write_models

from megakd.config import BenchmarkConfig, ParallelConfig
from megakd.data.batch import Sample

TINY = BenchmarkConfig(
    student_layers=2, student_hidden=64, teacher_layers=2, teacher_hidden=128, vocab_size=97, max_length=48, max_prompt_length=24,
    global_batch_size=6, micro_batch_size=2, repetitions=2, lr=1e-3, measure=("iteration", "generation"),
)  # fmt: skip


def read(path):
    return list(csv.DictReader(path.open()))


def benchmark(layout, config):
    run.run(config)


def test_both_systems_take_turns_on_equal_work_and_leave_csv_and_figure(tmp_path):
    config = replace(TINY, baseline="hf", out=str(tmp_path / "results" / "iteration"))
    for _ in range(2):
        run_distributed(benchmark, 1, config)
    rows = read(tmp_path / "results" / "iteration.csv")
    assert [row["system"] for row in rows] == ["megakd", HFSystem.name] * 2
    assert (tmp_path / "results" / "iteration.png").stat().st_size > 10_000
    for row in rows:
        assert row["commit"] and row["versions"].startswith(f"torch {torch.__version__}") and row["student"] == "2×64"
        assert sum(float(row[f"{part}_s"]) for part in PARTS) == pytest.approx(float(row["iteration_s"]), rel=0.5)
    ours, theirs = rows[:2]
    assert float(ours["real_share"]) > 1.5 * float(theirs["real_share"]) > 0
    assert float(theirs["iteration_ratio"]) > 0 and float(theirs["generation_cpu_ratio"]) > 0 and not ours["iteration_ratio"]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_megakd_alone_is_measured_at_any_layout(tmp_path, tp, pp):
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    everything = ("iteration", "generation", "memory")
    config = replace(TINY, teacher_hidden=128, student_hidden=128, parallel=parallel, measure=everything, out=str(tmp_path / "x"))
    run_distributed(benchmark, 2, config, tp=tp, pp=pp)
    (row,) = read(tmp_path / "x.csv")
    assert row["layout"] == f"TP{tp} PP{pp} of 2"
    assert float(row["rollout_s"]) > 0 and float(row["student_step_s"]) > 0 and float(row["peak_mib"]) > 0


def parts_of_generation(layout, config):
    """The account, and what all of it took; then the command's own way."""
    with run.model_folder(config, workload := make_workload(config)) as folder:
        system, account = MegakdSystem(config, workload, folder), Account()
        start = now()
        with account.taken():
            system.generate(workload.first)
        seconds = now() - start
    run.run(config)
    return account, seconds, totals(workload.first)


def test_the_parts_of_generation_add_up_and_leave_no_line(tmp_path):
    config = replace(TINY, measure=("generation_parts",), rollout_batch_size=2, out=str(tmp_path / "x"))
    ((account, seconds, (prompts, tokens)),) = run_distributed(parts_of_generation, 1, config)
    assert set(account.seconds) <= {*generation_parts.PARTS, generation_parts.REST} and account.seconds["head"] > 0
    assert sum(account.seconds.values()) == pytest.approx(seconds, rel=0.05)
    assert sum(account.step_rows.values()) == tokens - 6 and set(account.steps) <= {1, 2}, "each row's first token is the prefill's"
    assert account.prompt_columns >= prompts and not list(tmp_path.iterdir())


def other_student(layout, config):
    """A baseline whose student is another one."""
    load = hf_system.load
    hf_system.load = lambda folder, dtype: load(folder.parent / "teacher", dtype)
    with pytest.raises(ValueError, match=r"loss/.* is .* in megakd and .*: not the same work, so it is not timed"):
        run.run(config)


def test_what_is_wrong_is_not_timed(tmp_path):
    run_distributed(other_student, 1, replace(TINY, baseline="hf", out=str(tmp_path / "x")))
    assert not list(tmp_path.iterdir())


def test_losses_may_differ_by_the_tolerance_and_no_more():
    check_equal({"a": {"loss/x": 1.0, "lr": 1.0}, "b": {"loss/x": 1.00009, "lr": 2.0}}, 1e-4)
    with pytest.raises(ValueError, match=r"loss/x is 1 in a and 1\.0002 in b"):
        check_equal({"a": {"loss/x": 1.0}, "b": {"loss/x": 1.0002}}, 1e-4)


def test_transformers_writes_responses_that_end_where_they_are_told(tmp_path):
    workload = make_workload(TINY)
    write_models(model_configs(TINY, workload), tmp_path)
    responses = HFSystem(TINY, workload, tmp_path).generate(workload.first)
    assert [len(response) for response in responses] == [len(row.response) for row in workload.first]
    assert len({len(response) for response in responses}) > 1


def test_prompts_are_padded_on_the_left():
    tokens, mask = left_padded([(5, 6), (7,)], 3, padding=9)
    assert tokens.tolist() == [[9, 5, 6], [9, 9, 7]] and mask.tolist() == [[0, 1, 1], [0, 0, 1]]


def test_the_soft_prompt_without_peft_stands_before_the_tokens(tmp_path):
    write_models(model_configs(TINY, make_workload(TINY)), tmp_path)
    base = hf_system.load(tmp_path / "teacher", "fp32").eval()
    tokens = torch.tensor([[4, 8, 15, 16]])
    prompted = hf_system.SoftPromptInFront(base, base.get_input_embeddings().weight[[23, 42]].detach())
    logits = prompted(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    assert torch.allclose(logits, base(torch.tensor([[23, 42, 4, 8, 15, 16]])).logits, atol=1e-5)


def test_padding_is_counted_where_the_models_are_called():
    counter, model = PositionCounter(), torch.nn.Identity()
    counter.watch(model)
    for _ in range(5):
        model(torch.zeros(2, 10))
    assert counter.share([Sample(0, (1, 2, 3), (4, 5, 6)), Sample(1, (1,), (2, 3, 4))]) == pytest.approx(5 * (5 + 3) / 100)


def test_flops_are_those_of_real_positions_and_supervised_heads():
    workload = make_workload(TINY)
    row = Sample(0, (1, 2, 3), (4, 5))
    body = 4 * 2 * (2 * 12 * 64**2 + 2 * 4 * 64)  # 4 positions, 2 layers: 12 h² weights, and 4 / 2 positions looked at on average
    head = 2 * 2 * 64 * 97  # at the 2 positions that predict the response
    assert flops_of_iteration({"student": model_configs(TINY, workload)["student"]}, [row]) == pytest.approx(5 * (body + head))


class Hungry:
    """Needs 64 MiB for a moment."""

    def __init__(self, *_):
        pass

    def iterate(self, batch, number):
        torch.ones(16 * MIB)


def test_the_peak_is_what_was_needed_at_the_worst_moment():
    peak = peak_in_own_process(Hungry, TINY, make_workload(TINY), None)  # in this one the system may take back what lies idle
    assert 60 * MIB < peak < 90 * MIB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "x.jsonl"}, "--data and --tokenizer go together"),
        ({"student_hidden": 100}, "--student-hidden 100 is not a multiple of 64"),
        ({"max_prompt_length": 48}, "--max-prompt-length 48 leaves no room"),
        ({"repetitions": 0}, "--repetitions 0 must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes).check()


def test_the_baseline_runs_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--baseline hf runs in one process"):
        replace(TINY, baseline="hf").check()


def test_systems_swap_places_every_other_time():
    assert [measuring.in_turn("ab", number) for number in (1, 2, 3)] == ["ab", "ba", "ab"]
