"""scripts/plan.py: what it predicts from shallow runs is what deeper ones show, and what real ones were seen to need."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import tiny_config

from megakd.config import parse
from megakd.config.parse import from_flags
from megakd.config.plan import PlanConfig
from megakd.errors import UserError
from megakd.planning.depth import Line
from megakd.planning.layouts import Layout, layouts_of, possible
from megakd.planning.page import page
from megakd.planning.plan import micro_batches_of, models_of, plan_of, plans, ranks_of, simulated
from megakd.simulation import shim
from megakd.simulation.ranks import simulate

pytestmark = pytest.mark.skipif(not shutil.which(shim.COMPILER), reason=f"no {shim.COMPILER}: the simulation of a GPU needs a C++ compiler")

ROOT = Path(__file__).parents[2]
LENGTHS = ["--max-length", "40", "--max-prompt-length", "16", "--micro-batch-size", "2", "--global-batch-size", "8"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """config.json and nothing else."""
    made = {}
    for name, (hidden, layers) in {"student": (64, 6), "teacher": (128, 8)}.items():
        made[name] = tmp_path_factory.mktemp(name)
        tiny_config("gpt2", hidden=hidden, layers=layers, vocab_size=1000).save_pretrained(made[name])
    return made


def planned(folders, *more: str) -> PlanConfig:
    return from_flags(["--model", str(folders["student"]), "--teacher-model", str(folders["teacher"]), *LENGTHS, *more], PlanConfig())


def test_micro_batches_are_counted_within_both_limits(folders):
    """Rows are of 16 + 24 tokens, 39 positions; as many wait for a pipeline as the run itself makes."""
    for tokens, count in (([], 4), (["--micro-batch-tokens", "78"], 4), (["--micro-batch-tokens", "77"], 8), (["--micro-batch-tokens", "5"], 8)):
        assert micro_batches_of(planned(folders, *tokens), 8) == count


def test_a_deep_run_is_predicted_from_shallow_ones_and_written_down(folders, tmp_path):
    """6 and 8 layers over two stages, by runs of at most 4 over two: everything that is counted, on either stage, and the page and figure."""
    from megakd.planning.page import write

    config = planned(folders, "--tp", "1", "--pp", "2", "--out", str(tmp_path / "plan"))
    models, layout = models_of(config), Layout(1, 2, 1)
    shallow = ranks_of(config, models, layout)
    assert max(rank.student["n_layer"] for rank in shallow) == 4 and len(shallow) == 6
    whole = simulated(config, models, layout, (6, 8))
    *records, first, last = simulate([*shallow, whole, replace(whole, rank=1)])
    plan = plan_of(config, models, layout, records)
    for stage, record in zip(plan.stages, (first, last)):
        assert stage.peaks == pytest.approx(record.peaks, rel=0.01)  # in models so small a peak may move from one line to the next
        for part, work in record.parts.items():
            assert vars(stage.works[part]) == pytest.approx(vars(work), rel=1e-3), part
    assert plan.peak_gib == pytest.approx(max(max(r.peaks.values()) for r in (first, last)) / 2**30, rel=0.01)
    write(config, [plan])
    text = (tmp_path / "plan" / "plan.md").read_text()
    assert text == page(config, [plan]) + "\n" and f"{plan.iteration_s:.2f}" in text and "it fits" in text
    told = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert told[0]["peak_gib"] == plan.peak_gib and (tmp_path / "plan" / "plan.png").stat().st_size > 10_000


REAL_RUN = """
import json, re, sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
import psutil
from megakd.config.parse import from_values
from megakd.simulation.rank import Run
from megakd.simulation.record import Record
from megakd.simulation.settings import Simulated
from megakd.runtime.initialize import process_group_closed_at_exit
import torch
torch.set_num_threads(1)
asked = Simulated.read(Path(sys.argv[1]))
memory = SimpleNamespace(begin=lambda: None, by_maker={})
host = SimpleNamespace(part=lambda name: nullcontext(), record=Record(), memory=memory)
before = psutil.Process().memory_info().rss
with process_group_closed_at_exit():
    Run(asked, from_values(asked.flags), host).iterate()
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) - before)  # ru_maxrss is the starter's, too
"""


def test_the_peak_is_that_of_a_real_run_on_a_cpu(tmp_path):
    """In float32 and large enough that it is seen beside what a process has anyway; MALLOC_* so that what is freed is given back."""
    student = tiny_config("llama", hidden=512, layers=4, vocab_size=4000, num_attention_heads=8, intermediate_size=1376, max_position_embeddings=512)
    student.save_pretrained(tmp_path)
    flags = ["--method", "sft", "--model", str(tmp_path), "--dtype", "fp32", "--max-length", "256", "--max-prompt-length", "128"]
    config = from_flags([*flags, "--micro-batch-size", "8", "--global-batch-size", "8"], PlanConfig())
    asked = simulated(config, models_of(config), Layout(1, 1, 1), (4, 0))
    (record,) = simulate([asked])
    asked.write(tmp_path / "asked.json")
    environment = {"PATH": "", "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", REAL_RUN, str(tmp_path / "asked.json")], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert max(record.peaks.values()) == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)


@pytest.mark.slow
def test_the_peak_is_that_which_an_h200_was_seen_to_have(tmp_path):
    """benchmarks/results/gpu.md: gpt2-base, 5.0 GiB at most, when a rollout's cache did not stay. Its rows were Dolly's, of which the
    longest filled --max-length."""
    for name, (layers, hidden) in {"student": (12, 768), "teacher": (24, 1024)}.items():
        config = tiny_config("gpt2", hidden=hidden, layers=layers, vocab_size=50257, n_head=hidden // 64, n_positions=1024)
        config.save_pretrained(tmp_path / name)
    flags = ["--model", str(tmp_path / "student"), "--teacher-model", str(tmp_path / "teacher"), "--gpu", "h200", "--release-decode-cache"]
    (plan,) = plans(from_flags([*flags, "--micro-batch-size", "8", "--global-batch-size", "32"], PlanConfig()))
    assert plan.peak_gib == pytest.approx(5.0, rel=0.15)


def test_a_line_goes_through_its_runs():
    runs = [(2, 2), (4, 2), (2, 4)]
    of = lambda student, teacher: 7 + 3 * student + 5 * teacher
    assert Line.through(runs, (32, 40))([of(*depths) for depths in runs]) == of(32, 40)
    assert Line.through([(1, 0), (2, 0)], (9, 0))([of(1, 0), of(2, 0)]) == of(9, 0)


def test_layouts_are_those_that_both_models_and_the_batch_take(folders):
    models = models_of(planned(folders))
    assert [str(layout) for layout in possible(4, 8, models)] == [
        "TP 1 × PP 1 × DP 4", "TP 1 × PP 2 × DP 2", "TP 2 × PP 1 × DP 2", "TP 2 × PP 2 × DP 1", "TP 4 × PP 1 × DP 1",
    ]  # fmt: skip
    assert Layout(1, 1, 16) not in possible(16, 8, models)


def test_layouts_whose_weights_and_moments_alone_are_too_large_are_left_out(tmp_path):
    """18 bytes a parameter of 6.7 billion, which ranks share by TP, and the moments by DP where the optimizer is split."""
    sizes = {"hidden": 4096, "layers": 32, "vocab_size": 32000, "num_attention_heads": 32, "num_key_value_heads": 32, "intermediate_size": 11008}
    tiny_config("llama", **sizes).save_pretrained(tmp_path)
    flags = ["--method", "sft", "--model", str(tmp_path), "--gpus", "8", "--rank-layouts", "--most-stages", "1"]
    for more, least in (([], 2), (["--use-distributed-optimizer"], 1)):
        config = from_flags([*flags, *more], PlanConfig())
        assert [layout.tp for layout in layouts_of(config, models_of(config))] == [tp for tp in (1, 2, 4, 8) if tp >= least]


def test_what_is_predicted_for_the_papers_pairs_fits_and_is_what_the_page_says():
    spec = importlib.util.spec_from_file_location("plan_pairs", ROOT / "scripts" / "plan_pairs.py")
    plan_pairs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plan_pairs)
    folder = ROOT / "docs" / "results" / "planned"
    found = json.loads((folder / "planned.json").read_text())
    assert (folder / "README.md").read_text() == plan_pairs.page(found)
    for told in found.values():
        best, *others = told["layouts"]
        assert best["fits"] and best["gib"] <= 79.1 and all(best["seconds"] <= other["seconds"] for other in others if other["fits"])


@pytest.mark.parametrize(
    "more, said",
    [
        (["--gpus", "3", "--tp", "2"], "--gpus 3 is no multiple of TP 2 × PP 1 = 2; use one"),
        (["--gpus", "3"], "--global-batch-size 8 is no multiple of the 3 replicas on --gpus 3; use one"),
        (["--gpus", "7", "--rank-layouts"], "--gpus 7: no TP × PP × DP of so many fits"),
        (["--tp", "3"], "--tensor-model-parallel-size 3 does not divide"),
    ],
)
def test_what_does_not_fit_is_one_line(folders, more, said):
    config = planned(folders, *more)
    with pytest.raises(UserError, match=f"^{said}"):
        layouts_of(config, models_of(config))


@pytest.mark.parametrize("more, said", [
    (["--teacher-tp", "2"], "a teacher with a layout or ranks of its own is not planned"),
    (["--rollout-engine", "vllm"], "--rollout-engine vllm is not planned: it takes --vllm-gpu-memory-utilization of each card"),
])  # fmt: skip
def test_flags_that_cannot_be_planned_are_refused(folders, capsys, more, said):
    words = ["--model", str(folders["student"]), "--teacher-model", str(folders["teacher"]), *more]
    with pytest.raises(SystemExit):
        parse(words, PlanConfig, program="plan.py")
    assert said in capsys.readouterr().err
