"""An offloaded teacher teaches the same to the bit; its weights are on the device in its passes alone."""

from __future__ import annotations

import weakref

import pytest
import torch
from distributed import run_distributed
from stories import PAIRS, Batches, global_batch, text_batch
from test_methods import TOTAL_ITERS, method_inputs, run_config

from megakd.methods import METHODS, minillm
from megakd.runtime.initialize import seed_everything
from megakd.teachers import offloaded
from megakd.teachers.offloaded import HostWeights, OffloadedTeacher
from megakd.trainer import valid_losses


def train(layout, method_name, offloads):
    minillm.open_responses = lambda *args, **options: text_batch()
    seed_everything(1234, layout)
    config = run_config(method_name, 2, {"tensor_model_parallel_size": layout.tp_size, "pipeline_model_parallel_size": layout.pp_size})
    inputs = method_inputs(layout, config, PAIRS["llama"])
    model = inputs.teacher.model
    whole = {name: param.detach().clone() for name, param in model.named_parameters()}
    if offloads:
        inputs.teacher = OffloadedTeacher(model)
        check_away(model, inputs.teacher.weights)
        watch(model, inputs.teacher.weights)
    inputs.text = Batches(text_batch, layout)
    method = METHODS[method_name](inputs, config, total_iters=TOTAL_ITERS)
    logged = method.train_iteration(Batches(global_batch, layout), 1)
    valid = valid_losses(method, global_batch(1))
    if offloads:
        check_away(model, inputs.teacher.weights)
        assert all(torch.equal(param, whole[name]) for name, param in model.named_parameters())
    return {name: value for name, value in logged.items() if not name.startswith("time")}, valid


def check_away(model, weights):
    """All but the output layer is the host's copy, and what was on the device is gone."""
    for param, host in weights.kept:
        assert param.data_ptr() == host.data_ptr()
    away = {id(param) for param, _ in weights.kept}
    kept = [param for param in model.parameters() if id(param) not in away]
    assert [id(param) for param in kept] == ([id(model.output_weight())] if model.post_process else [])
    assert not any(copy() is not None for copy in on_device)


on_device: list[weakref.ref] = []  # copies that a pass has made


def watch(model, weights):
    """In every pass the layers compute with a copy that is not the host's."""

    def look(module, inputs):
        assert weights.users > 0
        for param, host in weights.kept:
            assert param.data_ptr() != host.data_ptr()
            on_device.append(weakref.ref(param.data.untyped_storage()))
            assert on_device[-1]() is not None

    model.decoder.layers[0].register_forward_pre_hook(look)


@pytest.mark.parametrize("tp, pp", [(1, 1), (1, 2)])
@pytest.mark.parametrize("method_name", ["kd", "seqkd", "promptkd", "minillm"])
def test_an_offloaded_teacher_teaches_the_same_to_the_bit(method_name, tp, pp):
    ranks = tp * pp
    plain, away = (run_distributed(train, ranks, method_name, offloads, tp=tp, pp=pp) for offloads in (False, True))
    assert plain == away


def test_a_copy_on_the_host_is_pinned_beside_a_gpu(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    assert torch.equal(offloaded.on_host(torch.ones(3)), torch.ones(3)) and len(pinned) == 1


def test_blocks_within_a_block_share_one_copy():
    class Tiny(torch.nn.Linear):
        post_process, layout = False, torch.empty(0)  # which has a device

    model = Tiny(2, 2)
    weights = HostWeights(model)
    with weights.on_device():
        copy = model.weight.data_ptr()
        with weights.on_device():
            assert model.weight.data_ptr() == copy
        assert model.weight.data_ptr() == copy
    assert model.weight.data_ptr() == weights.kept[0][1].data_ptr() != copy
