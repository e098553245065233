"""A teacher is asked for rows and for nothing else: one that gives truncated rows trains as well, and with all of them exactly so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from distributed import run_distributed
from megakd_kernels import TopKRows
from test_methods import PAIRS, TOTAL_ITERS, method_inputs, run_config, samples
from torch import distributed as dist

from megakd.data.dataloader import split_across_dp
from megakd.methods import METHODS
from megakd.teachers.live import LiveTeacher
from megakd.teachers.teacher import Teacher


class TruncatedTeacher(Teacher):
    """The k likeliest tokens of every row of a live teacher, and the mass of the rest."""

    def __init__(self, live: LiveTeacher, k: int):
        self.live, self.k, self.model = live, k, live.model

    def read(self, batches, *, to):
        return [self.truncated(rows, to) for rows in self.live.read(batches, to=to)]

    def truncated(self, rows, layout):
        shards = [torch.empty(len(rows.hidden_NH), len(rows.head_VpH)) for _ in range(layout.tp_size)]
        dist.all_gather(shards, rows.hidden_NH @ rows.head_VpH.t(), group=layout.tp_group)
        log_p = torch.cat(shards, 1)[:, : self.model.real_vocab_size].log_softmax(-1)
        kept, ids = log_p.topk(self.k)
        rest = torch.log1p(-kept.exp().sum(-1).clamp(max=1)) if self.k < log_p.shape[1] else torch.full((len(kept),), -torch.inf)
        return TopKRows(ids, kept, rest)


def losses_by_k(layout, objective, parallel):
    """The same KD iteration with the live teacher, and with its 97 (all), 40 and 5 likeliest tokens."""
    config = run_config("kd", 4, parallel)
    config = replace(config, distillation=replace(config.distillation, kd_objective=objective, kd_ratio=0.8))
    logged = {}
    for k in (None, 97, 40, 5):
        inputs = method_inputs(layout, config, PAIRS["llama"])
        inputs.teacher = TruncatedTeacher(inputs.teacher, k) if k else inputs.teacher
        method = METHODS["kd"](inputs, config, total_iters=TOTAL_ITERS)
        logged[k] = method.train(split_across_dp(samples(), layout.dp_size)[layout.dp_rank], 1)
    return logged


@pytest.mark.parametrize("tp, pp, dp", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
@pytest.mark.parametrize("objective", ["forward_kl", "jsd"])
def test_truncated_rows_train_and_whole_ones_exactly_so(objective, tp, pp, dp):
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    for logged in run_distributed(losses_by_k, tp * pp * dp, objective, parallel, tp=tp, pp=pp):
        for name in ("loss/total", "loss/lm", f"loss/{objective}", "grad_norm"):
            assert logged[97][name] == pytest.approx(logged[None][name], rel=2e-5, abs=1e-6), name
        distances = [logged[k][f"loss/{objective}"] for k in (5, 40, 97)]
        assert 0 < distances[0] < distances[1] < distances[2], "what is put together cannot be told apart"
