"""A second model around the weights of the first: the student with its adapters off, for whom no memory is taken.

Weights beside adapters are frozen, so what they were at the start they stay. Modules are the copy's own: its mode, its hooks, what decoding
switches off, and its lack of dropout do not touch the first.
"""

from __future__ import annotations

import copy

from torch import nn

from megakd.models.attention import SDPACoreAttention
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.models.linear import Adapted
from megakd.models.lora import Adapter
from megakd.models.transformer_layer import TransformerLayer


def without_adapters(model: HiddenStateGPTModel) -> HiddenStateGPTModel:
    """`model` as it was before it had adapters, frozen."""
    other = _twin(model)
    other.adapted = None
    for module in other.modules():
        if isinstance(module, Adapted) and module._modules.pop("adapters", None) is not None:
            module.adapters = None
    return other


def with_adapters_of_its_own(model: HiddenStateGPTModel) -> HiddenStateGPTModel:
    """`model` as it is now, frozen: its adapters are copies."""
    other = _twin(model)
    for module in other.modules():
        if isinstance(module, Adapter):
            for name, parameter in module._parameters.items():
                module._parameters[name] = copy.deepcopy(parameter).requires_grad_(False)
    return other


def _twin(model: HiddenStateGPTModel) -> HiddenStateGPTModel:
    """In evaluation mode, without dropout in any mode, and without the parts that a method trains."""
    other = _own_modules(model)
    other.method_parts, config = nn.ModuleDict(), copy.copy(model.config)  # the student's optimizer is going to write into that
    for module in other.modules():
        if getattr(module, "config", None) is model.config:
            module.config = config
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, TransformerLayer):
            module.hidden_dropout = 0.0
        elif isinstance(module, (SDPACoreAttention, Adapter)):
            module.dropout = 0.0
    return other.eval()


def _own_modules(module: nn.Module) -> nn.Module:
    """The same parameters and buffers in modules of their own; so are the dictionaries of hooks."""
    other = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):
            other.__dict__[name] = copy.copy(value)
    other._modules = {name: child if child is None else _own_modules(child) for name, child in module._modules.items()}
    return other
