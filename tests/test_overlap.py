"""--overlap-grad-reduce: gradients travel while the backward pass runs, and what is learnt is what is learnt without."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from distributed import run_distributed
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
from stories import global_batch
from test_methods import ENDS, PAIRS, TOKENIZER, models_of, run_config

from megakd import optimizer
from megakd.config import LoRAConfig
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
    """An iteration; in windows the micro-batches go through the model in two parts, and the last replica has an empty one behind them."""
    mine = split_across_dp(global_batch(iteration), method.layout.dp_size)[method.layout.dp_rank]
    if not in_windows:
        return method.train(mine, iteration)
    batches = method.batches(mine)
    counts = [1, len(batches) - 1] + [0] * (method.layout.dp_rank > 0)
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


def test_several_buckets_of_the_distributed_optimizer_which_no_checkpoint_keeps_are_refused():
    """A run of two replicas, saved with several buckets and continued by the same command, went on from other weights."""
    lines = lambda **parallel: [line for line in run_config("sft", 2, parallel).validation_errors() if line.startswith("--overlap-grad-reduce")]
    assert lines(overlap_grad_reduce=True, use_distributed_optimizer=True)
    assert not lines(overlap_grad_reduce=True) and not lines(use_distributed_optimizer=True)
