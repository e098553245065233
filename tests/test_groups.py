"""Groups are passed: one iteration of every method asks nothing of megatron-core's global state, so that models may differ in layout."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from distributed import run_distributed
from megatron.core import parallel_state
from stories import Batches, global_batch, text_batch
from test_methods import PAIRS, TOTAL_ITERS, method_inputs, run_config, samples

from megakd.methods import METHODS, minillm
from megakd.runtime.initialize import seed_everything
from megakd.trainer import valid_losses


def refuse_everywhere(name, getter):
    """Under every name that a module of megatron-core has imported it by."""

    def asked(*args, **options):
        raise AssertionError(f"megatron's global {name} was asked")

    for module in [module for key, module in sys.modules.items() if key.startswith("megatron.core")]:
        for bound in [bound for bound, value in vars(module).items() if value is getter]:
            setattr(module, bound, asked)


def refuse_global_state():
    """From now on a getter of it is a failure, in this process."""
    for name, getter in vars(parallel_state).copy().items():
        scratch, axis_of_0_19 = name == "get_global_memory_buffer", "gtp" in name  # no group; one that answers None where nobody made it
        if name.startswith("get_") and callable(getter) and not scratch and not axis_of_0_19:
            refuse_everywhere(name, getter)


def train_without_global_groups(layout, method_name, parallel):
    """Models, optimizer, an iteration that writes, and an evaluation; a getter of megatron's global state is a failure."""
    refuse_global_state()
    config = run_config(method_name, 2, parallel)
    config = replace(
        config,
        minillm=replace(config.minillm, num_rollouts=8),
        kd=replace(config.kd, on_policy_ratio=1.0 if method_name == "kd" else 0.0),
    )
    minillm.open_responses = lambda *args, **options: text_batch()
    seed_everything(1234, layout)
    method = METHODS[method_name](method_inputs(layout, config, PAIRS["gpt2"]), config, total_iters=TOTAL_ITERS)
    logged = method.train_iteration(Batches(global_batch, layout), 1)
    valid_losses(method, samples())
    return logged["grad_norm"]


@pytest.mark.parametrize("tp, pp, dp, zero", [(1, 1, 1, False), (2, 2, 1, False), (1, 1, 2, True)])
@pytest.mark.parametrize("method_name", METHODS)
def test_no_method_asks_megatrons_global_state(method_name, tp, pp, dp, zero):
    parallel = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "sequence_parallel": tp > 1,
        "use_distributed_optimizer": zero,
    }
    norms = run_distributed(train_without_global_groups, tp * pp * dp, method_name, parallel, tp=tp, pp=pp)
    assert len(set(norms)) == 1 and norms[0] > 0
