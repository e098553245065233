"""Which modules a layer may hold, and what training adds to them, switched off while they decode.

Decoding computes a few columns at a time: a module must treat each position on its own, but for self-attention, whose earlier
columns are in the cache. What lies within the linear layers, the norms and the MLP is theirs (adapters, biases), and is called by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from torch import nn

from megakd.models.attention import SDPACoreAttention
from megakd.models.transformer_layer import NormsBehind, SelfAttention

LAYER_MODULES = {"input_layernorm": nn.Module, "self_attention": SelfAttention, "pre_mlp_layernorm": nn.Module, "mlp": nn.Module}
NORMS_BEHIND = {"post_self_attn_layernorm": nn.Module, "post_mlp_layernorm": nn.Module}
ATTENTION_MODULES = {
    "linear_qkv": nn.Module,
    "q_layernorm": nn.Module,
    "k_layernorm": nn.Module,
    "core_attention": SDPACoreAttention,
    "linear_proj": nn.Module,
}


@contextmanager
def decoding(models: Iterable[GPTModel]) -> Iterator[None]:
    """In evaluation mode and without sequence parallelism, which would cut a single column; all is put back at the end."""
    with ExitStack() as stack:
        for model in models:
            stack.callback(_put_back, [(module, module.training) for module in model.modules()], *_without_sequence_parallelism(model))
            model.eval()
        yield


def _without_sequence_parallelism(model: GPTModel) -> list:
    """Switches it off; returns the configs and the linear layers that had it on."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    changed = [owner for owner in [*configs.values(), *model.modules()] if getattr(owner, "sequence_parallel", False)]
    for owner in changed:
        owner.sequence_parallel = False
    return changed


def _put_back(modes: list[tuple[nn.Module, bool]], *sequence_parallel) -> None:
    for module, training in modes:
        module.training = training
    for owner in sequence_parallel:
        owner.sequence_parallel = True


def check_layers(model: GPTModel) -> None:
    """Refuse a module that a layer would not call, or that decoding might run wrongly.

    Raises:
        NotImplementedError: there is one; the message names it.
    """
    for number, layer in enumerate(model.decoder.layers):
        bias_dropout_adds = {name: getattr(layer, name) for name in ("self_attn_bda", "cross_attn_bda", "mlp_bda")}
        known = LAYER_MODULES | (NORMS_BEHIND if isinstance(layer, NormsBehind) else {})
        _check(f"decoder.layers.{number}", dict(layer.named_children()) | bias_dropout_adds, known)
        attention = layer.self_attention
        _check(f"decoder.layers.{number}.self_attention", dict(attention.named_children()), ATTENTION_MODULES)


def _check(path: str, children: dict[str, object], known: dict[str, type]) -> None:
    for name, child in children.items():
        if not isinstance(child, (IdentityOp, known.get(name, IdentityOp))):
            kind = getattr(child, "__name__", type(child).__name__)
            raise NotImplementedError(
                f"{path}.{name}: this {kind} would be left out, or run without the columns before it when decoding; "
                f"here may be {', '.join(f'{name} ({kind.__name__})' for name, kind in known.items())}: see megakd/models/decoding.py"
            )
