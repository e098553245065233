"""Dropout: whose masks agree, when they change, who learns with it and who is read without."""

from __future__ import annotations

import pytest
import torch
from distributed import run_distributed
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from test_methods import PAIRS, TOTAL_ITERS, method_inputs, run_config, samples, split_across_dp
from test_trainer import command, inputs, numbers, run  # noqa: F401, `inputs` is a fixture

from megakd import trainer
from megakd.methods import METHODS
from megakd.runtime.initialize import seed_everything
from megakd.schedules import supervised_hidden
from megakd.trainer import valid_losses

DROPOUT = {"family": "gpt2", "layers": 2, "resid_pdrop": 0.3, "attn_pdrop": 0.3}


def draws(layout):
    """(place, what dropout draws outside and inside tensor-parallel regions), by (seed, iteration)."""
    drawn = {}
    for seed, iteration in [(1234, 5), (1235, 4), (1234, 6), (1234, 0)]:
        seed_everything(seed, layout, iteration=iteration)
        outside = torch.rand(1).item()
        with get_cuda_rng_tracker().fork():
            drawn[seed, iteration] = outside, torch.rand(1).item()
        seed_everything(seed, layout, iteration=iteration)
        assert torch.rand(1).item() == outside, "the same seed and iteration, the same masks"
    return (layout.tp_rank, layout.pp_rank, layout.dp_rank), drawn


def test_tensor_parallel_ranks_agree_outside_parallel_regions_all_else_differs():
    ranks = run_distributed(draws, 8, tp=2, pp=2)
    for tp, *stage in [(tp, pp, dp) for tp in (0, 1) for pp in (0, 1) for dp in (0, 1)]:
        (mine,) = [drawn for place, drawn in ranks if place == (tp, *stage)]
        (other,) = [drawn for place, drawn in ranks if place == (1 - tp, *stage)]
        assert all(mine[key][0] == other[key][0] and mine[key][1] != other[key][1] for key in mine)
    outside = {(*place[1:], *key): drawn[key][0] for place, drawn in ranks for key in drawn}
    inside = {(*place, *key): drawn[key][1] for place, drawn in ranks for key in drawn}
    assert len(set(outside.values())) == len(outside) == 16 and len(set(inside.values())) == len(inside) == 32


def losses(layout, method_name, pair):
    """Of the first iteration with and without the student's dropout; and what its teacher and its held-out losses say."""
    logged, held_out = [], []
    for spec in (pair, PAIRS["gpt2"]):
        config = run_config(method_name, 4, {})
        method = METHODS[method_name](method_inputs(layout, config, spec), config, total_iters=TOTAL_ITERS)
        seed_everything(1234, layout, iteration=1)
        mine = split_across_dp(samples(), layout.dp_size)[layout.dp_rank]
        method.student.train()
        held_out.append(valid_losses(method, samples()))
        assert torch.equal(*(supervised_hidden(method.student, method.batches(mine[:1]))[0] for _ in range(2))), "read twice"
        assert method.student.training, "the mode is put back"
        logged.append(method.train(mine, 1))
    return logged, held_out


def test_the_student_learns_with_dropout_and_is_read_without():
    pair = (DROPOUT, PAIRS["gpt2"][1])
    ((logged, held_out),) = run_distributed(losses, 1, "promptkd", pair)
    assert held_out[0] == held_out[1]
    for name in ("loss/prompt", "loss/prompt_kd", "grad_norm/prompt"):
        assert logged[0][name] == logged[1][name], name
    assert abs(logged[0]["loss/reverse_kl"] - logged[1]["loss/reverse_kl"]) > 1e-5
    ((logged, _),) = run_distributed(losses, 1, "sft", pair)
    assert abs(logged[0]["loss/lm"] - logged[1]["loss/lm"]) > 1e-5


def drawn_in_training(layout, arguments):
    """The first number that each iteration of a run draws."""
    drawn, iterate = [], trainer.METHODS["sft"].train_iteration

    def train_iteration(self, loader, iteration):
        drawn.append(torch.rand(1).item())
        return iterate(self, loader, iteration)

    trainer.METHODS["sft"].train_iteration = train_iteration
    run(layout, arguments)
    return drawn


def test_masks_differ_from_iteration_to_iteration_and_from_seed_to_seed(inputs):  # noqa: F811
    run_of = lambda name, seed: run_distributed(drawn_in_training, 1, command(inputs, name, "sft", seed=seed))[0]
    first, again, second = run_of("seed-1", 1), run_of("seed-1-again", 1), run_of("seed-2", 2)
    assert first == again and len({*first, *second}) == 8


def test_minillm_learns_without_dropout_whatever_the_folder_says(inputs):  # noqa: F811
    flags = {"num-rollouts": 8, "ppo-epochs": 2, "valid-data": inputs / "valid.jsonl"}
    none = {"hidden-dropout": 0, "attention-dropout": 0}
    for name, more in {"folder": {}, "none": none}.items():
        run_distributed(run, 1, command(inputs, f"minillm-dropout-{name}", "minillm", **flags, **more))
    assert numbers(inputs / "minillm-dropout-folder") == numbers(inputs / "minillm-dropout-none")
    for name, more in {"folder": {}, "none": none}.items():
        run_distributed(run, 1, command(inputs, f"sft-dropout-{name}", "sft", **more))
    assert numbers(inputs / "sft-dropout-folder") != numbers(inputs / "sft-dropout-none"), "the folder has dropout"


def recomputed(layout, arguments):
    """How often layers are asked to recompute: of the student, or of a teacher through which a gradient passes."""
    from megatron.core.transformer import transformer_block

    is_function = hasattr(transformer_block, "checkpointed_forward")  # from megatron-core 0.19 on; a method before
    owner, name = (transformer_block, "checkpointed_forward") if is_function else (transformer_block.TransformerBlock, "_checkpointed_forward")
    calls, forward = [], getattr(owner, name)
    setattr(owner, name, lambda *args, **options: calls.append(1) or forward(*args, **options))
    run(layout, arguments)
    return calls


@pytest.mark.parametrize("method, flags", [("sft", {}), ("promptkd", {}), ("minillm", {"num-rollouts": 8, "ppo-epochs": 2})])
def test_recomputing_activations_changes_no_number(inputs, method, flags):  # noqa: F811
    """With dropout the masks of the first pass must come again."""
    (calls,) = run_distributed(recomputed, 1, command(inputs, f"{method}-kept", method, **flags))
    assert not calls
    (calls,) = run_distributed(recomputed, 1, command(inputs, f"{method}-recomputed", method, recompute=True, **flags))
    assert len(calls) >= 4 * 4 * (2 if method == "promptkd" else 1)
    kept, again = numbers(inputs / f"{method}-kept"), numbers(inputs / f"{method}-recomputed")
    for one, other in zip(kept, again, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)
