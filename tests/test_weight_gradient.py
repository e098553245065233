"""Gradients that are summed in float32 and never rounded to the weights' own type: of linear layers under --gradient-accumulation-fusion,
of the word embedding always."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from distributed import run_distributed
from megakd_kernels import VocabShard
from megatron.core.tensor_parallel import layers
from stories import PAIRS, global_batch
from test_methods import run_config
from tiny import tiny_config

from megakd.config import LoRAConfig
from megakd.data.batch import micro_batches
from megakd.data.dataloader import split_across_dp
from megakd.loading import align_vocabularies
from megakd.losses.distillation import sft_loss
from megakd.models.model_provider import build_model
from megakd.optimizer import StudentOptimizer
from megakd.runtime import weight_gradient
from megakd.runtime.initialize import seed_everything
from megakd.schedules import forward_backward
from megakd.trainer import student_options

LAYERS, WORDS = 2, "embedding.word_embeddings.weight"


def gradients(
    layout, dtype, rows: int, sequence_parallel: bool, fused: bool = False, by_rows: bool = True, family: str = "llama"
) -> dict[str, torch.Tensor]:
    """main_grad of all weights, of one iteration in micro-batches of so many rows."""
    config = run_config("sft", rows, {"sequence_parallel": sequence_parallel})
    config = replace(config, training=replace(config.training, gradient_accumulation_fusion=fused))
    spec = tiny_config(**PAIRS[family][0])
    seed_everything(3, layout)
    options = {"dtype": dtype, "sequence_parallel": sequence_parallel, **student_options(config)}
    model = build_model(spec, layout, **align_vocabularies([spec.vocab_size], layout.tp_size), **options)
    optimizer = StudentOptimizer(model, config.training, total_iters=1, distributed=False)
    assert model.words_summed_by_rows
    model.words_summed_by_rows = by_rows
    optimizer.zero_grad()
    batches = micro_batches(split_across_dp(global_batch(), layout.dp_size)[layout.dp_rank], rows)
    vocabulary = VocabShard(model.real_vocab_size, tp_group=layout.tp_group)
    forward_backward(optimizer.ddp, batches, lambda q, batch, _: sft_loss(q, batch.supervised_labels, vocabulary), layout=layout)
    return {name: param.main_grad.clone() for name, param in model.named_parameters()}


def of_layers(gradients):
    """Those of linear layers' weights."""
    return {name: gradient for name, gradient in gradients.items() if "linear" in name and name.endswith("weight")}


def check_fusion(layout, sequence_parallel: bool):
    plain, fused = (of_layers(gradients(layout, torch.float32, 2, sequence_parallel, fused)) for fused in (False, True))
    assert len(plain) == 4 * LAYERS
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-5, atol=1e-7)
    plain, fused = (of_layers(gradients(layout, torch.bfloat16, 8, sequence_parallel, fused)) for fused in (False, True))
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=2**-7, atol=2**-9 * gradient.abs().max().item())
        assert unrounded(gradient) < 0.05 and unrounded(fused[name]) > 0.5, name


def unrounded(gradient: torch.Tensor) -> float:
    """The share of numbers of a gradient's sum over tokens that bfloat16 does not have, though float32 rounds a division by the tokens."""
    total = gradient * sum(len(sample.response) for sample in global_batch())
    return ((total - total.bfloat16().float()).abs() > 1e-5 * total.abs()).float().mean().item()


@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, True)])
def test_a_linear_layers_gradient_is_summed_unrounded(tp, sequence_parallel):
    run_distributed(check_fusion, tp, sequence_parallel, tp=tp)


def check_words(layout, family: str, sequence_parallel: bool):
    table, rows = (gradients(layout, torch.float32, 2, sequence_parallel, by_rows=by_rows, family=family) for by_rows in (False, True))
    for name, gradient in table.items():
        torch.testing.assert_close(rows[name], gradient, rtol=1e-5, atol=1e-7)
    narrow = [gradients(layout, torch.bfloat16, 8, sequence_parallel, by_rows=by_rows, family=family) for by_rows in (False, True)]
    if not layout.is_first_stage:
        return
    assert table[WORDS].any()
    table, rows = (gradients[WORDS] for gradients in narrow)
    torch.testing.assert_close(rows, table, rtol=2**-7, atol=2**-7 * table.abs().max().item())
    if family == "llama":  # with a head of its own, whose gradient was never rounded
        read = table.any(1)
        assert unrounded(table[read]) < 0.05 and unrounded(rows[read]) > 0.1


@pytest.mark.parametrize("family", ["llama", "llama student of a gpt2", "opt"])  # the second's words are its head, the third has padding
@pytest.mark.parametrize("tp, pp, sequence_parallel", [(1, 1, False), (2, 1, True), (1, 2, False)])
def test_the_word_embeddings_gradient_is_summed_row_by_row(family, tp, pp, sequence_parallel):
    run_distributed(check_words, tp * pp, family, sequence_parallel, tp=tp, pp=pp)


def test_apexs_own_function_is_used_where_megatron_found_it(monkeypatch):
    apexs = SimpleNamespace()
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", apexs, raising=False)
    assert not weight_gradient.install() and layers.fused_weight_gradient_mlp_cuda is apexs
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    assert weight_gradient.install() and layers.fused_weight_gradient_mlp_cuda is weight_gradient.STAND_IN


def test_adapters_beside_frozen_weights_have_no_use_for_it():
    config = replace(run_config("sft", 2, {}), lora=LoRAConfig(peft="lora"))
    config = replace(config, training=replace(config.training, gradient_accumulation_fusion=True))
    assert [line for line in config.validation_errors() if line.startswith("--gradient-accumulation-fusion")]
    plain = replace(config, lora=LoRAConfig())
    assert not [line for line in plain.validation_errors() if line.startswith("--gradient-accumulation-fusion")]
