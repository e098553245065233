"""On-policy KD written by hand on transformers: as the papers' code does it, and as one does who knows the libraries of today."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megakd.config import SystemsConfig
from megakd_benchmarks.hf_system import MasterWeights, left_padded, load, reverse_kl
from megakd_benchmarks.systems.turns import Turn
from megakd_benchmarks.systems.workload import CHECKED, Task


class PaddedLoop:
    """The papers' code: a micro-batch writes on prompts left-padded to --max-prompt-length; both models' logits of every position in
    float32, full-vocabulary softmax and logarithms of all of them, masked afterwards."""

    def __init__(self, config: SystemsConfig, task: Task, models: Path):
        self.config, self.task = config, task
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.student, self.teacher = (load(models / name, config.dtype).to(self.device) for name in ("student", "teacher"))
        self.teacher.requires_grad_(False)
        self.optimizer = MasterWeights(self.student, config.lr)

    def run(self, turn: Turn) -> None:
        """Every iteration."""
        for batch in self.task.prompts:
            turn.begin()
            turn.end(self.iterate(batch, greedy=turn.number <= CHECKED))

    def iterate(self, prompts: Sequence[Sequence[int]], *, greedy: bool) -> float:
        """The loss of a global batch."""
        rows, tokens = self.config.micro_batch_size, len(prompts) * self.config.max_new_tokens
        self.optimizer.zero_grad()
        parts = [prompts[first : first + rows] for first in range(0, len(prompts), rows)]
        loss = sum(self._gradient(self.write(part, self.width(part), greedy=greedy), tokens) for part in parts)
        self.optimizer.step()
        return float(loss)

    def width(self, prompts: Sequence[Sequence[int]]) -> int:
        """Positions that prompts are padded to."""
        return self.config.max_prompt_length

    def generate(self, prompts: Sequence[Sequence[int]]) -> None:
        """Responses to all prompts in one batch, as wide as the longest."""
        self.write(prompts, max(map(len, prompts)), greedy=False)

    @torch.no_grad()
    def write(self, prompts: Sequence[Sequence[int]], width: int, *, greedy: bool) -> tuple[Tensor, Tensor]:
        """Prompts and responses, left-padded, [B, S], and where they are real."""
        self.student.eval()
        tokens, mask = (part.to(self.device) for part in left_padded(prompts, width, padding=0))
        sampling = {"do_sample": False} if greedy else {"do_sample": True, "top_k": 0, "top_p": 1.0}
        limits = {"max_new_tokens": self.config.max_new_tokens, "eos_token_id": None, "pad_token_id": 0}
        written = self.student.generate(input_ids=tokens, attention_mask=mask, **sampling, **limits)
        return written, torch.cat([mask, mask.new_ones(written.shape[0], written.shape[1] - width)], 1)

    def _gradient(self, written: tuple[Tensor, Tensor], tokens: int) -> Tensor:
        ids, real = written
        inputs = {"input_ids": ids, "attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
        self.student.train()
        loss = self.divergence(inputs) / tokens
        loss.backward()
        return loss.detach()

    def divergence(self, inputs: dict[str, Tensor]) -> Tensor:
        """Σ KL(q‖p) over the responses."""
        q = self.student(**inputs, use_cache=False).logits
        with torch.no_grad():
            p = self.teacher(**inputs, use_cache=False).logits
        predicts = torch.zeros_like(inputs["input_ids"], dtype=torch.float32)
        predicts[:, -self.config.max_new_tokens - 1 : -1] = 1
        return reverse_kl(q, p, predicts)


class LigerLoop(PaddedLoop):
    """Padded to the longest prompt of a micro-batch alone; logits in chunks of the responses' positions by Liger's fused linear loss."""

    def __init__(self, config: SystemsConfig, task: Task, models: Path):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # not every comparison has it

        super().__init__(config, task, models)
        self.loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)

    def width(self, prompts):
        return max(map(len, prompts))

    def divergence(self, inputs):
        with torch.no_grad():
            fixed = self.hidden(self.teacher, inputs)
        hidden = self.hidden(self.student, inputs)
        labels = inputs["input_ids"][:, -self.config.max_new_tokens :].reshape(-1)
        mean = self.loss(hidden, self.student.lm_head.weight, fixed, self.teacher.lm_head.weight, labels)
        return mean * len(labels)

    def hidden(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
        """[N, H] at the positions that predict the responses."""
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        return states[:, -self.config.max_new_tokens - 1 : -1].reshape(-1, states.shape[-1])
