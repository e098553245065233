"""--overlap-grad-reduce: gradients travel while the backward pass runs, and what is learnt is what is learnt without."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from distributed import run_distributed
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from stories import global_batch
from test_methods import ENDS, PAIRS, TOKENIZER, models_of, run_config
from test_trainer import command, numbers, write_inputs

from megakd import optimizer, trainer
from megakd.checkpointing import NativeCheckpoint
from megakd.config import LoRAConfig, parse
from megakd.data.dataloader import split_across_dp
from megakd.losses.distillation import sft_loss
from megakd.methods import build_method
from megakd.models.lora import adapt
from megakd.schedules import Windows
from megakd.teachers.live import LiveTeacher

PARAMETERS = 20_000  # of a bucket, so that these models have several
ITERATIONS = 3


def trained(layout, pair: str, parallel: dict, *, lora: bool = False, in_windows: bool = False):
    """What is logged and what this rank's student is after some iterations, and how often a reduction began inside a backward pass."""
    early = watch_reductions()
    optimizer.DistributedDataParallelConfig = partial(DDP_CONFIG, bucket_size=PARAMETERS)
    config = run_config("sft" if in_windows else "promptkd", 2, parallel)
    config = replace(config, lora=LoRAConfig(peft="lora" if lora else "none"))
    student, teacher = models_of(layout, config, PAIRS[pair])
    if lora:
        adapt(student, config.lora, seed=5)
    method = build_method(config, student, LiveTeacher(teacher), TOKENIZER, ENDS, total_iters=10)
    logged = [iterate(method, iteration, in_windows) for iteration in range(1, ITERATIONS + 1)]
    return logged, [param.detach().numpy() for param in method.student.parameters()], len(early)


DDP_CONFIG = optimizer.DistributedDataParallelConfig


def watch_reductions() -> list[bool]:
    """A list that grows with each reduction that is begun before all gradients are there."""
    early, finishing = [], []
    start, finish = BucketGroup.start_grad_sync, BucketGroup.finish_grad_sync

    def watched_start(self, *args, **options):
        if not finishing:
            early.append(True)
        return start(self, *args, **options)

    def watched_finish(self, *args, **options):
        finishing.append(True)
        try:
            return finish(self, *args, **options)
        finally:
            finishing.pop()

    BucketGroup.start_grad_sync, BucketGroup.finish_grad_sync = watched_start, watched_finish
    return early


def iterate(method, iteration: int, in_windows: bool) -> dict[str, float]:
    """An iteration; in windows the micro-batches go through the model in two parts, and the last replica has an empty one behind them.

    Not in the first iteration, in which Megatron learns how often a gradient comes by before it is whole.
    """
    mine = split_across_dp(global_batch(iteration), method.layout.dp_size)[method.layout.dp_rank]
    if not in_windows:
        return method.train(mine, iteration)
    batches = method.batches(mine)
    first = len(batches) if iteration == 1 else 1
    counts = [first, len(batches) - first] + [0] * (method.layout.dp_rank > 0)
    context = Windows([(count, [None] * count) for count in counts])
    return method.student_step(batches, lambda q, batch, _: sft_loss(q, batch.supervised_labels, method.vocabulary), iteration, context=context)


@pytest.mark.parametrize(
    "pair, pp, zero, more",
    [
        ("gpt2", 1, False, {}),  # its head and its embedding are one
        ("llama student of a gpt2", 1, True, {}),
        ("opt", 2, False, {}),
        ("llama", 1, False, {"lora": True}),
        ("gpt2", 1, True, {"in_windows": True}),
    ],
)
def test_gradients_that_travel_early_teach_the_same(pair, pp, zero, more):
    parallel = {"pipeline_model_parallel_size": pp, "use_distributed_optimizer": zero}
    run = lambda overlap: run_distributed(partial(trained, **more), 2 * pp, pair, parallel | {"overlap_grad_reduce": overlap}, pp=pp)
    for (logged, weights, early), (logged_late, weights_late, late) in zip(run(True), run(False)):
        assert early > late == 0
        if not zero:
            assert logged == logged_late and all(np.array_equal(a, b) for a, b in zip(weights, weights_late, strict=True))
        for one, other in zip(logged, logged_late):  # the ranks' shares of the gradient's norm are cut by buckets
            assert one == pytest.approx(other, rel=1e-6)
        for one, other in zip(weights, weights_late, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


ZERO, OVERLAP = {"use-distributed-optimizer": True}, {"overlap-grad-reduce": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a run of two replicas whose gradients travel early in several buckets, saved after 2 and after 4 iterations."""
    root = write_inputs(tmp_path_factory.mktemp("buckets"))
    assert all(count > 2 for count in run_distributed(run_in_buckets, 2, words_of(root, "early", **OVERLAP)))
    return root


def words_of(root: Path, save: str, **more) -> list[str]:
    """A command; no gradient is clipped, since the last bits of its norm depend on how the ranks share it."""
    plain = {"clip-grad": 0, "hidden-dropout": 0, "attention-dropout": 0, "eval-interval": 4}
    return command(root, save, "sft", **(plain | ZERO | more))


def run_in_buckets(_layout, words: list[str]) -> int:
    """A run of this rank's; how many reductions began inside a backward pass."""
    early = watch_reductions()
    optimizer.DistributedDataParallelConfig = partial(DDP_CONFIG, bucket_size=PARAMETERS // 4)
    trainer.export_to_hf = trainer.plot_training = lambda *_, **options: None  # not what is asked here
    trainer.train(parse(words))
    return len(early)


def saved(run: Path, iteration: int) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint: weights, master weights, moments."""
    native = NativeCheckpoint(run / "checkpoints", iteration=iteration)
    whole = lambda key: native.read(key, tuple(slice(0, size) for size in native.shape(key)))
    return {key: whole(key).numpy() for key in native.keys}


def unlike(one: Path, other: Path, iteration: int) -> list[str]:
    """What two runs' checkpoints have not alike to the bit."""
    ours, theirs = saved(one, iteration), saved(other, iteration)
    assert ours.keys() == theirs.keys() and any(key.startswith("optimizer.state.exp_avg_sq.") for key in ours)
    return [key for key in ours if not np.array_equal(ours[key], theirs[key])]


def logged(run: Path) -> list[dict]:
    """Without the norm."""
    return [{name: value for name, value in row.items() if name != "grad_norm"} for row in numbers(run)]


def test_several_buckets_of_a_shared_optimizer_teach_and_save_what_one_does(runs):
    """To the bit, but for the norm that is logged."""
    assert run_distributed(run_in_buckets, 2, words_of(runs, "late")) == [0, 0]
    assert logged(runs / "early") == logged(runs / "late") != []
    assert not unlike(runs / "early", runs / "late", 2) and not unlike(runs / "early", runs / "late", 4)


@pytest.mark.parametrize("tp, dp", [(1, 2), (1, 1), (2, 1)])
def test_what_several_buckets_of_a_shared_optimizer_saved_goes_on_as_the_unbroken_run(runs, tp, dp):
    """To the bit at the layout that saved it."""
    unbroken, resumed = runs / "early", runs / f"TP{tp} DP{dp}"
    shutil.copytree(unbroken, resumed)
    run_distributed(run_in_buckets, tp * dp, words_of(runs, resumed.name, tp=tp, resume=2, **OVERLAP), tp=tp)
    for ours, theirs in zip(numbers(resumed), numbers(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    if (tp, dp) == (1, 2):
        assert numbers(resumed) == numbers(unbroken) and not unlike(resumed, unbroken, 4)
