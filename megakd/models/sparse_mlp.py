"""Sparse layers: of E gated MLPs, experts, each token is given to k, which a router chooses.

    p = softmax(W_router x)       its k largest, made to sum to 1 where the family does so
    y = Σ p_e W_down,e (act(W_gate,e x) · W_up,e x)        over the chosen e

Every expert is cut over tensor-parallel ranks as an MLP is, and their sum travels once. The router is whole on every rank, and so are
what it reads and its gradient. T tokens, H hidden, I / tp of an expert's inner columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from megakd.models.linear import ColumnLinear, RowLinear
from megakd.models.transformer_layer import TransformerLayer, WithBias


@dataclass(frozen=True)
class Routing:
    """Of `experts` each token gets `chosen`; `normalised`: their weights sum to 1."""

    experts: int
    chosen: int
    normalised: bool


class SparseLayer(TransformerLayer):
    """The common layer, whose MLP is sparse."""

    def __init__(self, config, submodules, *, routing: Routing, **kwargs):
        super().__init__(config, submodules, **kwargs)
        self.mlp = SparseMLP(config, routing, self.tp_group)


class SparseMLP(MegatronModule):
    """[s, b, h] to [s, b, h]. Its steps have no fixed shape: how many tokens an expert gets is known when they are routed."""

    def __init__(self, config, routing: Routing, tp_group):
        super().__init__(config)
        self.routing, self.tp_group = routing, tp_group
        device = torch.cuda.current_device()
        self.router = nn.Linear(config.hidden_size, routing.experts, bias=False, dtype=config.params_dtype, device=device)
        submodules = MLPSubmodules(linear_fc1=ColumnLinear, linear_fc2=RowLinear)
        build = lambda: MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=tp_group)
        self.experts = nn.ModuleList(build() for _ in range(routing.experts))

    def forward(self, hidden_states: Tensor) -> WithBias:
        scattered, group = self.config.sequence_parallel, self.tp_group
        x = hidden_states
        if scattered:
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=group)
        tokens_TH = x.flatten(0, 1)
        weights_Tk, experts_Tk = self.route(tokens_TH)
        # what an expert's part of the columns gives back is a part of the gradient: summed over ranks here
        tokens_TH, weights_Tk = (copy_to_tensor_model_parallel_region(y, group=group) for y in (tokens_TH, weights_Tk))
        y = (self.of_experts(tokens_TH, experts_Tk) * weights_Tk[..., None]).sum(1).view_as(x)
        reduce = reduce_scatter_to_sequence_parallel_region if scattered else reduce_from_tensor_model_parallel_region
        return reduce(y, group=group), None

    def route(self, tokens_TH: Tensor) -> tuple[Tensor, Tensor]:
        """[T, k] twice: weights, and the experts that they are of."""
        p = F.softmax(self.router(tokens_TH), -1, dtype=torch.float32)
        weights_Tk, experts_Tk = p.topk(self.routing.chosen, -1)
        if self.routing.normalised:
            weights_Tk = weights_Tk / weights_Tk.sum(-1, keepdim=True)
        return weights_Tk.to(tokens_TH.dtype), experts_Tk

    def of_experts(self, tokens_TH: Tensor, experts_Tk: Tensor) -> Tensor:
        """[T, k, H], this rank's part. Tokens are put in the order of their experts, so that nothing is summed in a random order."""
        order = experts_Tk.flatten().argsort(stable=True)
        counts = experts_Tk.flatten().bincount(minlength=self.routing.experts).tolist()
        parts = tokens_TH[order // self.routing.chosen].split(counts)
        done = torch.cat([self._expert(expert, part) for expert, part in zip(self.experts, parts)])
        return done[order.argsort()].view(*experts_Tk.shape, -1)

    def _expert(self, expert: MLP, tokens: Tensor) -> Tensor:
        """Also of no tokens: its weights then get a gradient of zeros."""
        gate, up = F.linear(tokens, expert.linear_fc1.weight).chunk(2, -1)
        return F.linear(self.config.activation_func(gate) * up, expert.linear_fc2.weight)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """megatron's own for any module, which would take a list of modules for whole on every rank."""
        state = sharded_state_dict_default(self.router, f"{prefix}router.", sharded_offsets, metadata, tp_group=self.tp_group)
        for number, expert in enumerate(self.experts):
            state |= expert.sharded_state_dict(f"{prefix}experts.{number}.", sharded_offsets, metadata)
        return state
