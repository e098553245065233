"""A teacher on 8- or 4-bit codes, or on products of them, is near the one it was made of, the same at every layout, frozen, and exactly the model of its numbers."""

from __future__ import annotations

import re

import pytest
import torch
from distributed import run_distributed
from megakd_kernels import VocabShard
from oracle import StateDictSource
from tiny import tiny_config, tiny_model
from torch.nn.utils import parametrize

from megakd.config import parse
from megakd.data.batch import Sample, micro_batches
from megakd.data.rows import read_rows
from megakd.data.tokenizer import encode
from megakd.errors import UserError
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.loading import ModelFolder, align_vocabularies, frozen, load_model
from megakd.losses.distillation import sft_loss
from megakd.models import eight_bit, weight_only
from megakd.models.model_provider import build_model, load_weights
from megakd.models.weight_only import check_quantization, pack, quantize, stored_bytes, unpack
from megakd.schedules import forward_backward, supervised_hidden
from megakd.teachers.live import LiveTeacher
from megakd.teachers.quantised import difference, quantised

pytest.importorskip("torchao")


def samples(count=6):
    draw = torch.Generator().manual_seed(3)
    ids = lambda n: tuple(torch.randint(1, 97, (n,), generator=draw).tolist())
    return [Sample(i, ids(3 + i), ids(5)) for i in range(count)]


def tiny(layout, family):
    config = tiny_config(family)
    model = build_model(config, layout, **align_vocabularies([config.vocab_size], layout.tp_size))
    load_weights(model, StateDictSource(tiny_model(config)))
    return frozen(model)


def stories(layout, folder, tokens):
    model_folder = ModelFolder.open(folder)
    model = frozen(load_model(model_folder, layout, **align_vocabularies([model_folder.config.vocab_size], layout.tp_size)))
    batches = micro_batches([Sample(i, (), ids) for i, ids in enumerate(tokens)], 4)
    found = {}
    for kind in weight_only.BOUNDS | eight_bit.TYPES:
        model = frozen(load_model(model_folder, layout, **align_vocabularies([model_folder.config.vocab_size], layout.tp_size)))
        before = LiveTeacher(model).read(batches, to=layout)
        quantize(model, kind)
        found[kind] = difference(before, LiveTeacher(model).read(batches, to=layout), batches, model)
    return found


def test_on_real_text_int8_is_within_a_hundredth_of_a_nat_at_every_layout(data_folder):
    folder = data_folder / "models" / "stories260K"
    texts = read_rows(next((data_folder / "corpora" / "tinystories-sample").glob("*.txt")))
    tokens = [tuple(ids[:128]) for ids in encode(ModelFolder.open(folder).tokenizer, [texts[i].response for i in range(12)])]
    (alone,) = run_distributed(stories, 1, folder, tokens)
    assert 0 < alone["int8"][2] < 1e-2 and abs(alone["int8"][0] - alone["int8"][1]) < 1e-2 and 0.5 < alone["int8"][1] < 3
    assert alone["int8"][2] < alone["int4"][2] < 0.3
    assert alone["int8"][2] < alone["int8-dynamic"][2] < 1e-2 and alone["int8-dynamic"][2] < alone["fp8-dynamic"][2] < 2e-2
    for layout in ({"tp": 2}, {"pp": 2}):
        for found in run_distributed(stories, 2, folder, tokens, **layout):
            assert found["int8"] == pytest.approx(alone["int8"], rel=1e-3, abs=1e-7)
            for kind in eight_bit.TYPES:  # a last bit before rounding may make another code
                assert found[kind] == pytest.approx(alone[kind], rel=3e-2, abs=1e-4)


def numbers_in_place(model):
    """The same codes, written back as plain weights."""
    for module in list(model.decoder.modules()):
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight")


def check_paths(layout, family, kind):
    """Reading, and a gradient through the frozen model to a soft prompt, equal those of plain weights of the same numbers."""
    batches = micro_batches(samples(), 2)
    models = [tiny(layout, family) for _ in range(2)]
    plain, size = supervised_hidden(models[0], batches), stored_bytes(models[0])
    for model in models:
        quantize(model, kind)
    numbers_in_place(models[1])
    assert not any(parameter.requires_grad for model in models for parameter in model.parameters())
    read = [supervised_hidden(model, batches) for model in models]
    assert all(torch.equal(a, b) for a, b in zip(*read))
    assert not any(torch.equal(a, b) for a, b in zip(read[0], plain)), "codes are not the numbers that they stand for"
    for a, b in zip(read[0], plain):
        assert (a - b).norm() <= {"int8": 0.03, "int4": 0.4}[kind] * b.norm(), "they are near"
    gradients = [prompt_gradient(model, batches) for model in models]
    if layout.is_first_stage:
        assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    return stored_bytes(models[0]) / size


def prompt_gradient(model, batches):
    vectors = torch.full((3, model.config.hidden_size), 0.1, requires_grad=True)
    vocabulary = VocabShard(model.real_vocab_size, tp_group=model.layout.tp_group)
    loss = lambda q, batch, _: sft_loss(q, batch.supervised_labels, vocabulary)
    forward_backward(model, batches, loss, layout=model.layout, soft_prompt=vectors)
    return vectors.grad


@pytest.mark.parametrize("family, kind, ranks, layout", [("gpt2", "int8", 1, {}), ("llama", "int4", 1, {}), ("llama", "int8", 2, {"tp": 2}), ("gpt2", "int4", 2, {"pp": 2})])
def test_a_quantised_teacher_is_the_model_of_its_numbers(family, kind, ranks, layout):
    for share in run_distributed(check_paths, ranks, family, kind, **layout):
        assert share < {"int8": 0.5, "int4": 0.4}[kind], "it is smaller"


# ---- products of codes


def of_codes(rows, kind):
    """What codes of these rows stand for, in float64: the nearest whole number of 127 parts, or the nearest float8, of each row's largest."""
    largest = rows.double().abs().amax(1, keepdim=True)
    scale = largest / {"int8-dynamic": 127, "fp8-dynamic": 448}[kind]
    scaled = rows.double() / scale
    return (scaled.round() if kind == "int8-dynamic" else scaled.float().to(torch.float8_e4m3fn).double()) * scale


dynamic = pytest.mark.parametrize("kind", eight_bit.TYPES)


@dynamic
@pytest.mark.parametrize("rows", [1, 40])
def test_a_dynamic_product_is_that_of_the_codes_of_both(kind, rows):
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, 64, generator=draw), torch.randn(32, 64, generator=draw)
    x[0] *= 100  # a scale of its own
    codes, scales = eight_bit.encode(weight, kind)
    assert codes.element_size() == 1
    found = eight_bit.multiply(*eight_bit.encode(x, kind), codes, scales, torch.float32)
    wanted = of_codes(x, kind) @ of_codes(weight, kind).T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    assert (found - x @ weight.T).norm() < 0.05 * (x @ weight.T).norm()


def products_of_layers(layout, kind, sequence_parallel):
    """Of a layer that is cut along its rows and one that is cut along its columns, the latter's whole on every rank."""
    config = tiny_config("llama", intermediate_size=128)
    options = {"sequence_parallel": sequence_parallel, **align_vocabularies([config.vocab_size], layout.tp_size)}
    model = build_model(config, layout, **options)
    load_weights(model, StateDictSource(tiny_model(config)))
    quantize(frozen(model), kind)
    mlp, draw = model.decoder.layers[0].mlp, torch.Generator().manual_seed(0)
    narrow, wide = (torch.randn(6, 2, size, generator=draw) for size in (64, 128))
    mine = lambda x, axis: x.chunk(layout.tp_size, axis)[layout.tp_rank]
    with torch.no_grad():
        rows = mlp.linear_fc1(mine(narrow, 0) if sequence_parallel else narrow)[0].unflatten(-1, (2, -1))  # both halves of the gate
        columns = mlp.linear_fc2(mine(wide, -1))[0]
    return rows, columns


@dynamic
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_that_share_a_layer_multiply_the_codes_of_the_whole(kind, sequence_parallel):
    ((rows, columns),) = run_distributed(products_of_layers, 1, kind, False)
    parts = run_distributed(products_of_layers, 2, kind, sequence_parallel, tp=2)
    torch.testing.assert_close(torch.cat([part[0] for part in parts], -1), rows, rtol=1e-5, atol=1e-5)
    summed = torch.cat([part[1] for part in parts]) if sequence_parallel else parts[0][1]
    torch.testing.assert_close(summed, columns, rtol=1e-5, atol=1e-5)


@dynamic
def test_codes_of_a_row_that_ranks_share_are_those_of_the_whole(kind):
    rows = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    whole, scales = eight_bit.encode(rows, kind)

    def encoded(layout):
        codes, scales = eight_bit.encode(rows.chunk(2, 1)[layout.tp_rank], kind, layout.tp_group)
        return codes.float(), scales

    for part, found in zip(whole.float().chunk(2, 1), run_distributed(encoded, 2, tp=2)):
        assert torch.equal(found[0], part) and torch.equal(found[1], scales)


def test_a_layer_whose_shape_has_no_product_multiplies_numbers():
    def products(layout):
        model = tiny(layout, "llama")
        quantize(model, "int8-dynamic")
        layer = model.decoder.layers[0]
        return layer.mlp.linear_fc2.multiply is not None, layer.self_attention.linear_qkv.multiply is not None

    assert tiny_config("llama").intermediate_size == 112
    assert run_distributed(products, 1) == [(True, True)] and run_distributed(products, 2, tp=2) == [(False, True)] * 2


@dynamic
def test_a_row_of_zeros_stays_one(kind):
    codes, scales = eight_bit.encode(torch.zeros(2, 16), kind)
    assert not codes.float().any() and scales.isfinite().all()


def check_dynamic(layout, kind, sequence_parallel):
    """How a teacher of 8-bit products reads and generates, and what passes a gradient through it."""
    config = tiny_config("llama", intermediate_size=128)
    options = {"sequence_parallel": sequence_parallel, **align_vocabularies([config.vocab_size], layout.tp_size)}
    models = [build_model(config, layout, **options) for _ in range(2)]
    for model in models:
        load_weights(model, StateDictSource(tiny_model(config)))
        quantize(frozen(model), kind)
    counted, multiply = [], eight_bit.multiply
    eight_bit.multiply = lambda *given: counted.append(1) or multiply(*given)
    batches = micro_batches(samples(), 2)
    read = supervised_hidden(models[0], batches)
    products = len(counted)
    numbers_in_place(models[1])
    for module in models[1].decoder.modules():
        module.multiply = None
    gradients = [prompt_gradient(model, batches) for model in models]
    assert torch.equal(*gradients) and len(counted) == products, "where a gradient passes, the numbers that codes stand for are multiplied"
    (first,) = generate(models[0], [(1, 2, 3)], [0], Sampling(max_new_tokens=4, greedy=True), eos_id=0)
    assert len(counted) > products and len(first) == 4
    return products / len(batches), [part.tolist() for part in read], gradients[0].tolist(), first


@dynamic
def test_a_dynamic_teacher_multiplies_codes_at_every_layout_alike(kind):
    (alone,) = run_distributed(check_dynamic, 1, kind, False)
    assert alone[0] == 4 * tiny_config("llama").num_hidden_layers
    for sequence_parallel in (False, True):
        for found in run_distributed(check_dynamic, 2, kind, sequence_parallel, tp=2):
            assert found[0] == alone[0] and found[3] == alone[3]
            for part, whole in zip(map(torch.tensor, found[1]), map(torch.tensor, alone[1])):
                assert (part - whole).norm() < 2e-2 * whole.norm(), "a last bit before rounding makes another code here and there"
            torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(alone[2]), rtol=1e-4, atol=1e-5)


def recomputed_gradient(layout, kind):
    """Of a soft prompt through layers whose activations are recomputed, and through layers that keep them; each with the loss."""
    config, found = tiny_config("llama", intermediate_size=128), []
    for options in ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, {}):
        model = build_model(config, layout, **align_vocabularies([config.vocab_size], layout.tp_size), **options)
        load_weights(model, StateDictSource(tiny_model(config)))
        quantize(frozen(model), kind)
        vectors, tokens = torch.full((3, config.hidden_size), 0.1, requires_grad=True), torch.arange(1, 13).view(2, 6)
        loss = model.train()(tokens, torch.arange(6).expand(2, 6), vectors).square().sum()
        loss.backward()
        found += [loss.detach(), vectors.grad]
    return found


@dynamic
def test_a_recomputed_layer_multiplies_the_same_numbers_twice(kind):
    for loss, gradient, kept_loss, kept_gradient in run_distributed(recomputed_gradient, 2, kind, tp=2):
        assert torch.equal(loss, kept_loss) and torch.equal(gradient, kept_gradient)


def test_an_older_card_has_no_products_of_float8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with pytest.raises(UserError, match=r"--teacher-quantize fp8-dynamic needs a card of compute capability 8.9 .*; use int8-dynamic"):
        check_quantization("fp8-dynamic")
    check_quantization("int8-dynamic")


# ---- codes that stand for numbers


def test_codes_of_4_bits_are_packed_two_a_byte():
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)
    assert torch.equal(unpack(pack(codes), 16), codes) and pack(codes).numel() == codes.numel() // 2
    assert torch.equal(unpack(pack(codes[:, :7]), 7), codes[:, :7])


def test_scales_of_a_row_are_those_of_all_its_columns():
    def codes(layout):
        model = tiny(layout, "llama")
        quantize(model, "int8")
        return model.decoder.layers[0].mlp.linear_fc2.parametrizations.weight.original1

    (whole,) = run_distributed(codes, 1)
    for part in run_distributed(codes, 2, tp=2):
        assert torch.equal(part, whole)


def test_what_it_costs_is_told(capfd):
    def teach(layout, on_prompts):
        asked = [Sample(s.sample_id, s.prompt, ()) for s in samples()] if on_prompts else samples()
        quantised(tiny(layout, "gpt2"), "int8", asked, 2)

    for on_prompts in (False, True):
        run_distributed(teach, 1, on_prompts)
        said = capfd.readouterr().err
        loss, change, was, kl, held, of = (float(number) for number in re.search(
            r"--teacher-quantize int8: on the first batch the teacher's loss is ([\d.]+), ([+-][\d.]+) from ([\d.]+); KL\(teacher‖quantised\) "
            r"is ([\d.e+-]+) nats a token; a rank holds ([\d.]+) MiB of ([\d.]+)", said).groups())  # fmt: skip
        assert loss - was == pytest.approx(change, abs=2e-4) and 3 < loss < 10 and 0 < kl < 1e-2 and held < of


def test_without_torchao_it_is_refused(monkeypatch):
    monkeypatch.setattr(weight_only, "find_spec", lambda name: None)
    check_quantization("none")
    with pytest.raises(UserError, match=r"--teacher-quantize int8 needs torchao; install it .*, or leave the flag out"):
        check_quantization("int8")


def test_a_store_has_no_weights_to_quantise(capsys):
    with pytest.raises(SystemExit):
        parse(["--method", "kd", "--model", "m", "--teacher-cache", "c", "--train-data", "d", "--save", "s", "--train-iters", "1", "--teacher-quantize", "int8"])
    assert "--teacher-quantize int8 is of a model, and scripts/cache_teacher.py has it too" in capsys.readouterr().err
