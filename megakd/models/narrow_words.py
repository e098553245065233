"""Word embeddings and a head that are narrower than the layers, as OPT-350m has them: E columns for words, H for hidden states.

    into the layers    x = W_in e(token) + positions        project_in  [H, E]
    out of them        z = W_head (W_out h)                 project_out [E, H]

Both projections are whole on every tensor-parallel rank, where what they read and the gradient that comes back are whole, too.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from torch import nn


def narrow_words(model: GPTModel, width: int) -> None:
    """Give a stage word embeddings and an output layer of `width` columns in place of those of the hidden size, and the projections."""
    config, common = model.config, {"config": model.config, "tp_group": model.pg_collection.tp}
    if model.pre_process:
        model.embedding.word_embeddings = VocabParallelEmbedding(
            model.vocab_size, width, init_method=config.embedding_init_method, reduce_scatter_embeddings=False, **common
        )
        model.project_in = _projection(model, width, config.hidden_size)
    if model.post_process:
        model.output_layer = ColumnParallelLinear(
            width, model.vocab_size, init_method=config.init_method, bias=False, gather_output=False,
            skip_weight_param_allocation=model.pre_process and model.share_embeddings_and_output_weights, **common,
        )  # fmt: skip
        model.project_out = _projection(model, config.hidden_size, width)
    if model.pre_process or model.post_process:
        model.setup_embeddings_and_output_layer()


def _projection(model: GPTModel, columns: int, rows: int) -> nn.Linear:
    return nn.Linear(columns, rows, bias=False, dtype=model.config.params_dtype, device=torch.cuda.current_device())
