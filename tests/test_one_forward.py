"""Training and decoding are one forward pass: a module added to a layer changes both alike, one that is not known is refused by name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from distributed import run_distributed
from test_generation import EOS, GREEDY, prompts, soft_prompt
from tiny import tiny_config
from torch import nn

from megakd.generation.decoder import Decoder, aligned
from megakd.generation.generate import generate
from megakd.models import model_provider
from megakd.models.decoding import decoding
from megakd.models.layer_specs import LAYER, Norm, with_attention
from megakd.models.linear import ColumnLinear
from megakd.models.model_provider import build_model

PROMPTS = sorted(prompts()[:4], key=len, reverse=True)
RESPONSES = [[7, 41, 5, 88, 13], [3, 3, 60, 2, 9], [17, 80, 44, 6, 21], [50, 4, 11, 70, 31]]


class Adapter(nn.Module):
    """A low-rank addition to a column-parallel layer."""

    def __init__(self, linear, rank=3):
        super().__init__()
        self.linear = linear
        self.down, self.up = (nn.Parameter(torch.empty(*shape)) for shape in ((rank, 64), (linear.weight.shape[0], rank)))

    def forward(self, x):
        output, bias = self.linear(x)
        return output + x @ self.down.t() @ self.up.t(), bias


class Doubled(ColumnLinear):
    """A layer's own class, named by a family's spec."""

    def forward(self, x):
        output, bias = super().forward(x)
        return output * 2, bias


def adapt(model, name):
    for layer in model.decoder.layers:
        owner = layer.self_attention if name == "linear_qkv" else layer.mlp
        setattr(owner, name, Adapter(getattr(owner, name)))


FAMILIES = dict(model_provider.FAMILIES)
ADDITIONS = {  # name: (layer spec, Hugging Face config fields, what is done to the model)
    "nothing": (LAYER, {}, None),
    "q/k norms": (with_attention(q_layernorm=Norm, k_layernorm=Norm), {}, None),
    "another linear layer in the spec": (with_attention(linear_qkv=Doubled), {}, None),
    "biases": (LAYER, {"attention_bias": True, "mlp_bias": True}, None),
    "an adapter around q, k, v": (LAYER, {}, partial(adapt, name="linear_qkv")),
    "an adapter in the MLP": (LAYER, {}, partial(adapt, name="linear_fc1")),
}


def build(layout, monkeypatch, family, addition, **options):
    """A model with the addition; a parameter's values depend on its name alone, so that what is added is all that differs."""
    spec, fields, change = ADDITIONS[addition]
    plain = FAMILIES[family]
    qk_norms = {f"decoder.layers.*.self_attention.{x}_layernorm.{kind}": None for x in "qk" for kind in ("weight", "bias")}
    table = lambda *args: plain.table(*args) | qk_norms
    monkeypatch.setitem(model_provider.FAMILIES, family, replace(plain, layer_spec=lambda hf: spec, table=table))
    model = build_model(tiny_config(family, layers=2, **fields), layout, padded_vocab_size=128, **options)
    if change:
        change(model)
    for name, param in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(map(ord, name.replace(".linear.", "."))))
        param.data = torch.randn(param.shape, generator=generator) * 0.2 + name.endswith("layernorm.weight")
    return model


def training_logits(model):
    """[B, response, Vp] of right-padded rows, through megatron's autograd functions."""
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES)]
    tokens = torch.tensor([row + [1] * (len(rows[0]) - len(row)) for row in rows])
    hidden = model.eval()(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
    logits = (hidden.transpose(0, 1) @ model.output_weight().t()).detach()
    return torch.stack([x[len(prompt) - 1 : len(prompt) + 4] for x, prompt in zip(logits, PROMPTS)])


@torch.inference_mode()
def decoded_logits(model):
    """The same, step by step on a cache, the responses being given; the model in training mode."""
    decoder = Decoder(model.train(), len(PROMPTS), aligned(max(map(len, PROMPTS)) + 5))
    decoder.begin(max(map(len, PROMPTS)))
    decoder.expect(PROMPTS)
    with decoding([model]):
        steps = decoder.prefill([])
        for i, tokens_B in enumerate(torch.tensor(RESPONSES).t()[:4]):
            steps.append(decoder.decode(tokens_B, torch.tensor(i), decoder.width + i + 1))
    return torch.stack(steps, 1)


@pytest.mark.parametrize("tp, sequence_parallel", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_added_to_a_layer_changes_training_and_decoding_alike(monkeypatch, family, tp, sequence_parallel):
    def check(layout):
        plain = None
        for addition in ADDITIONS:
            if family == "gpt2" and addition == "biases":
                continue  # it has them
            model = build(layout, monkeypatch, family, addition, sequence_parallel=sequence_parallel, hidden_dropout=0.3)
            if sequence_parallel and "adapter" in addition:
                continue  # one that gathers the sequence is another adapter
            trained, decoded = training_logits(model), decoded_logits(model)
            torch.testing.assert_close(decoded, trained, rtol=1e-5, atol=5e-6, msg=partial("{}: {}".format, addition))
            plain = trained if addition == "nothing" else plain
            assert addition == "nothing" or (trained - plain).abs().max() > 0.1, f"{addition} changes nothing"

    run_distributed(check, tp, tp=tp)


def refused(layout, monkeypatch, change, message):
    model = build(layout, monkeypatch, "llama", "nothing")
    change(model.decoder.layers[1])
    with pytest.raises(NotImplementedError, match=message):
        generate(model, prompts(), range(len(prompts())), GREEDY, eos_id=EOS)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda layer: layer.add_module("memory", nn.Linear(2, 2)), r"decoder.layers.1.memory: this Linear would be left out"),
        (lambda layer: setattr(layer, "cross_attention", nn.Identity()), r"decoder.layers.1.cross_attention: this Identity would"),
        (lambda layer: setattr(layer, "self_attention", nn.GRU(2, 2)), r"layers.1.self_attention: this GRU.*self_attention \(SelfAttention\)"),
        (
            lambda layer: layer.self_attention.add_module("gate", nn.Linear(2, 2)),
            r"decoder.layers.1.self_attention.gate: this Linear.*here may be linear_qkv \(Module\), q_layernorm",
        ),
        (lambda layer: setattr(layer.self_attention, "core_attention", nn.Identity()), r"self_attention.core_attention: this Identity"),
    ],
)  # fmt: skip
def test_a_module_that_decoding_does_not_know_is_refused_by_name(monkeypatch, change, message):
    run_distributed(refused, 1, monkeypatch, change, message)


def test_a_family_whose_spec_holds_such_a_module_is_refused_before_training(monkeypatch):
    def another_bias_dropout_add(training, fused):
        return None

    spec = replace(LAYER, submodules=replace(LAYER.submodules, mlp_bda=another_bias_dropout_add))
    monkeypatch.setitem(ADDITIONS, "bda", (spec, {}, None))

    def check(layout):
        with pytest.raises(NotImplementedError, match=r"decoder.layers.0.mlp_bda: this another_bias_dropout_add would be left out"):
            build(layout, monkeypatch, "llama", "bda")

    run_distributed(check, 1)


def test_a_model_whose_decoding_fails_is_as_it_was(monkeypatch):
    def check(layout):
        model = build(layout, monkeypatch, "llama", "nothing", sequence_parallel=True).train()
        model.decoder.layers[0].eval()
        switches = lambda: [(m.training, getattr(m, "sequence_parallel", None)) for m in model.modules()]
        before = switches()
        with pytest.raises(RuntimeError, match="stop"), decoding([model, model]):
            assert not any(training or sequence_parallel for training, sequence_parallel in switches())
            assert not model.config.sequence_parallel
            raise RuntimeError("stop")
        assert switches() == before and model.config.sequence_parallel

    run_distributed(check, 2, tp=2)


def test_training_goes_on_after_decoding(monkeypatch):
    """Nothing that decoding has made without gradients is kept for training."""

    def check(layout):
        gradients = []
        for decodes in (False, True):
            model = build(layout, monkeypatch, "llama", "q/k norms", sequence_parallel=True).train()
            if decodes:
                generate(model, PROMPTS, range(4), GREEDY, eos_id=EOS, soft_prompt=soft_prompt())
            tokens = torch.tensor([PROMPTS[0]])
            model(tokens, torch.arange(tokens.shape[1])[None]).square().mean().backward()
            gradients.append([param.grad for param in model.parameters() if param.grad is not None])
        assert len(gradients[0]) > 10 and all(map(torch.equal, *gradients))

    run_distributed(check, 2, tp=2)
