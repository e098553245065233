"""The soft prompt: a few trained vectors in front of the frozen teacher (PromptKD, arXiv 2402.12842).

It is a float32 parameter on every rank, equal everywhere. Only the first pipeline stage reads it; there its gradient is the same on
every tensor-parallel rank (the first layer's input gradient is whole), so it travels along the pipeline and is summed over replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.runtime.parallel_layout import ParallelLayout


class SoftPrompt(torch.nn.Module):
    """`vectors` [P, H], H the teacher's hidden size."""

    def __init__(self, vectors_PH: Tensor, layout: ParallelLayout):
        super().__init__()
        self.layout = layout
        self.vectors = torch.nn.Parameter(vectors_PH.float().clone())

    @classmethod
    def from_tokens(cls, teacher: HiddenStateGPTModel, token_ids: Sequence[int], length: int) -> SoftPrompt:
        """The teacher's word embeddings of `token_ids`, repeated or cut to `length`."""
        repeated = (list(token_ids) * length)[:length]
        return cls(word_embeddings(teacher, repeated), teacher.layout)

    @classmethod
    def random(cls, teacher: HiddenStateGPTModel, length: int, seed: int) -> SoftPrompt:
        """Normal vectors as large as the teacher's own word embeddings."""
        sample = word_embeddings(teacher, list(range(min(1000, teacher.real_vocab_size))))
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(length, sample.shape[1], generator=generator).to(sample.device)
        return cls(noise * sample.float().std(), teacher.layout)

    def synchronize_gradient(self, tokens: Tensor) -> None:
        """Σ over replicas divided by the tokens of the global batch, on every rank."""
        if self.vectors.grad is None:
            self.vectors.grad = torch.zeros_like(self.vectors)
        gradient = self.layout.broadcast_from_first_stage(self.vectors.grad)
        self.layout.sum_over_data_parallel(gradient).div_(tokens.clamp(min=1))


@torch.no_grad()
def word_embeddings(model: HiddenStateGPTModel, token_ids: list[int]) -> Tensor:
    """[len(token_ids), H] in float32, on every rank."""
    device = torch.cuda.current_device()
    if model.pre_process:
        found = model.word_embeddings(torch.tensor([token_ids], device=device))[0].float().contiguous()
    else:
        found = torch.empty(len(token_ids), model.embedding_size, device=device)
    return model.layout.broadcast_from_first_stage(found)
