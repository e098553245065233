"""A whole iteration of every method, its evaluation and its checkpoint, as a GPU would meet them; faults that it must notice.

Simulated, not run: megakd/simulation/ says what that sees. `make test` has one layout a method, `-m slow` the whole table.
`python tests/gpu_simulation/golden.py` writes the peaks anew.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checks import disagreement, refusals, waits
from jobs import LAYOUTS, job

from megakd.config import METHODS
from megakd.simulation import shim
from megakd.simulation.ranks import simulate
from megakd.simulation.record import Record
from megakd.simulation.settings import Simulated

pytestmark = pytest.mark.skipif(not shutil.which(shim.COMPILER), reason=f"no {shim.COMPILER}: the simulation of a GPU needs a C++ compiler")

CASES = [(method, layout) for method in METHODS for layout in LAYOUTS]
DIAGONAL = [("sft", "TP1"), ("kd", "TP2 SP"), ("seqkd", "TP1"), ("distillm", "TP1"), ("minillm", "DP2 zero"), ("promptkd", "TP2 PP2"),
            ("response_priming", "TP1"), ("minillm", "deterministic")]  # fmt: skip
assert {method for method, _ in DIAGONAL} == set(METHODS)
GOLDEN = Path(__file__).with_name("golden.json")
BUDGET = {"sft": 3, "kd": 3, "seqkd": 3, "distillm": 3, "minillm": 3, "promptkd": 4, "response_priming": 3}  # waits of an iteration, at most
LOOKS = 3  # at the tokens of a group of rows, of which the longest writes 17: once in 8 steps, and at the end


FAULTS = {  # planted in faults.py: (method, layout), what is said
    "batches_stay_on_the_host": (("sft", "TP1"), "CPU tensor"),
    "counts_are_summed_on_the_host": (("sft", "DP2 zero"), "NCCL: a CPU tensor in allreduce_"),
    "a_loss_in_another_type": (("sft", "TP1"), "dtype"),
    "a_decode_step_that_looks": (("promptkd", "TP1"), "in a CUDA graph: item"),
    "the_last_rank_reduces_once_more": (("sft", "TP2 SP"), "rank 0 and rank 1 differ"),
    "a_stage_sends_less": (("sft", "TP2 PP2"), "sends"),
    "every_loss_is_looked_at": (("sft", "TP1"), "budget"),
    "gradients_are_kept_twice": (("sft", "TP1"), "golden"),
}


def simulated(jobs: dict[object, list[Simulated]]) -> dict[object, list[Record]]:
    """All of them in one go: torch is imported once."""
    ranks = [(name, rank) for name, job in jobs.items() for rank in job]
    found: dict[object, list[Record]] = {name: [] for name in jobs}
    for (name, _), record in zip(ranks, simulate([rank for _, rank in ranks])):
        found[name].append(record)
    return found


def with_fault(fault: str) -> list[Simulated]:
    (method, layout), _ = FAULTS[fault]
    return job(method, layout, plant=f"faults:{fault}", iterations=1 + (method == "sft"), after=())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Of the one run that writes its checkpoint."""
    return tmp_path_factory.mktemp("simulated")


@pytest.fixture(scope="module")
def found(run_folder) -> dict[object, list[Record]]:
    """By case of the diagonal, by fault, and of `run_folder`."""
    (rank,) = job("promptkd", "TP1", folder=str(run_folder / "checkpoints"), source=str(run_folder))
    (run_folder / "config.json").write_text(json.dumps(rank.student))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where faults.py is
        return simulated({case: job(*case) for case in DIAGONAL} | {fault: with_fault(fault) for fault in FAULTS} | {run_folder: [rank]})


def check(method: str, layout: str, records: list[Record]) -> None:
    """Everything that holds of every case."""
    for rank, record in enumerate(records):
        assert not refusals(record), f"rank {rank}: {refusals(record)[0]}"
        assert not over_budget(method, record), f"rank {rank} waits more often than before: {waits(record)}"
        assert not {part for part, _ in record.copies} & {"teacher", "prompt_step", "student_step"}, "batches travel to the device once"
        assert record.captures == 0, "in the second iteration each number of rows is captured already"
        assert record.parts["student_step"].launches > 100 and record.messages  # something was seen
    assert disagreement(records) is None
    written = json.loads(GOLDEN.read_text()).get(f"{method}, {layout}", [])  # of methods whose rooms are kept over the run there is none yet
    for rank, (record, golden) in enumerate(zip(records, written)):
        assert record.peaks.keys() == golden.keys()
        assert record.peaks == pytest.approx(golden, rel=0.03), f"rank {rank}: peaks in bytes by part; golden.py writes them anew"


def over_budget(method: str, record: Record) -> bool:
    """Whether the host waits for the device more often than it has to; each stage of a pipeline has its own group of rows."""
    looks = sum(count for line, count in waits(record).items() if line.startswith("rollout"))
    groups = max([len(message.ranks) for message in record.messages if message.peer is not None], default=1)
    return looks > LOOKS * groups or sum(waits(record).values()) - looks > BUDGET[method]


@pytest.mark.parametrize("method, layout", DIAGONAL)
def test_an_iteration_asks_a_gpu_for_nothing_that_it_refuses(method, layout, found):
    check(method, layout, found[method, layout])


@pytest.mark.slow
def test_no_method_asks_for_it_at_any_layout():
    for (method, layout), records in simulated({case: job(*case) for case in CASES}).items():
        check(method, layout, records)


def test_what_lives_between_iterations_is_weights_gradients_and_moments(found):
    """Bytes a parameter: the student's bfloat16 and float32 weight, float32 gradient, two moments; of the teacher, weights alone."""
    (record,) = found["distillm", "TP1"]
    student, teacher = (parameters_of_gpt2(hidden) for hidden in (128, 256))
    assert record.resident["student"] == pytest.approx(2 * student, rel=0.03)
    assert record.resident["teacher weights"] == pytest.approx(2 * teacher, rel=0.03)
    assert record.resident["gradients and optimizer"] == pytest.approx((4 + 4) * student, rel=0.03)
    assert record.resident["optimizer"] == pytest.approx((4 + 4) * student, rel=0.03)


def parameters_of_gpt2(hidden: int, *, layers: int = 2, vocabulary: int = 1024, positions: int = 64) -> int:
    """jobs.py's, its vocabulary padded."""
    layer = 12 * hidden**2 + 13 * hidden
    return (vocabulary + positions) * hidden + layers * layer + 2 * hidden


def test_a_checkpoint_is_written_and_read(found, run_folder):
    (record,) = found[run_folder]
    assert not refusals(record)
    assert (run_folder / "checkpoints" / "iter_0000002" / "common.pt").is_file()
    assert any(part == "save" and what == "copy to host" for part, what, _ in record.waits)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, found):
    (method, layout), said = FAULTS[fault]
    records = found[fault]
    seen = [*(text for record in records for text in refusals(record)), disagreement(records) or ""]
    if over_budget(method, records[0]):
        seen.append("budget")
    golden = json.loads(GOLDEN.read_text()).get(f"{method}, {layout}")
    if golden and max(records[0].peaks.values()) > 1.03 * max(golden[0].values()):
        seen.append("golden")
    assert any(said in text for text in seen), seen


def test_without_a_compiler_it_is_one_line(monkeypatch, tmp_path):
    from megakd.errors import UserError

    monkeypatch.setattr(shim, "COMPILER", "no-such-compiler")
    monkeypatch.setattr(shim, "CACHE", tmp_path)
    with pytest.raises(UserError, match=r"^the simulation of a GPU needs a C\+\+ compiler once, and there is no no-such-compiler; install g\+\+"):
        shim.compiled()
