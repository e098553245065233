"""The same iteration as PromptKD's reference code does it, on transformers and PEFT.

    rollout        per micro-batch, prompts left-padded to --max-prompt-length, until its longest response is written
    forwards       every row padded to --max-length; logits of every position; the soft prompt's positions cut off the logits
    prompt step    prompted teacher with gradient, base teacher, student;      loss KL(p_P‖q) + c·KL(p_P‖p)
    student step   student with gradient, prompted teacher once more;          loss KL(q‖p_P)
    losses         full-vocabulary softmax, log_softmax, products and masks in float32, over padding too; then masked
    optimizers     AdamW on the student, AdamW on the soft prompt, each clipped

It differs from the reference where the results would differ: losses are token means over the global batch, and all micro-batches
make the prompt's gradient before the student learns. Neither changes how much is computed. One process, no DeepSpeed.

B rows, S positions, V vocabulary, P soft prompt, H hidden.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, StoppingCriteria

from megakd.config import BenchmarkConfig, PromptKDConfig, TrainingConfig
from megakd.data.batch import Batch, Sample, collate
from megakd.reporting.stopwatch import Stopwatch
from megakd.runtime.initialize import resolve_dtype
from megakd_benchmarks.megakd_system import TOTAL_ITERS
from megakd_benchmarks.workload import PositionCounter, Workload

HAS_PEFT = importlib.util.find_spec("peft") is not None
if HAS_PEFT:
    from peft import PromptTuningConfig, get_peft_model


class HFSystem:
    """Student, and teacher behind its soft prompt, in this process. With PEFT where it is installed."""

    name = "transformers + PEFT" if HAS_PEFT else "transformers"

    def __init__(self, config: BenchmarkConfig, workload: Workload, models: Path):
        self.config, self.device = config, "cuda" if torch.cuda.is_available() else "cpu"
        self.student, base = (load(models / name, config.dtype).to(self.device) for name in ("student", "teacher"))
        self.teacher = with_soft_prompt(base, list(workload.prompt_ids))
        self.prompt = [parameter for parameter in self.teacher.parameters() if parameter.requires_grad]
        self.optimizer = MasterWeights(self.student, config.lr)
        self.prompt_optimizer = adamw(self.prompt, config.lr)
        self.time, self.counter = Stopwatch(), PositionCounter()
        for model in (self.student, base, self.teacher):
            self.counter.watch(model)

    def iterate(self, batch: Sequence[Sample], iteration: int) -> dict[str, float]:
        """Losses of one PromptKD iteration."""
        rows = self.config.micro_batch_size
        parts = [batch[first : first + rows] for first in range(0, len(batch), rows)]
        with self.time("rollout"):
            for part in parts:
                self.write(part, width=self.config.max_prompt_length)
        batches = [collate(part, seq_length=self.config.max_length).to(self.device) for part in parts]
        tokens = sum(micro_batch.num_supervised for micro_batch in batches)
        return self.prompt_step(batches, tokens, iteration) | self.student_step(batches, tokens)

    def generate(self, batch: Sequence[Sample]) -> list[list[int]]:
        """All rows together, as wide as the longest prompt."""
        sequences = self.write(batch, width=max(len(row.prompt) for row in batch))
        return [response[: len(row.response)] for row, response in zip(batch, sequences.tolist())]

    @torch.no_grad()
    def write(self, rows: Sequence[Sample], *, width: int) -> Tensor:
        """Responses [B, S], S the longest; a row that has ended is filled with EOS."""
        self.student.eval()
        self.counter.watching = False
        tokens, mask = left_padded([row.prompt for row in rows], width, self.student.config.eos_token_id)
        ends = GivenEnds([len(row.response) for row in rows], width, self.device)
        sequences = self.student.generate(
            input_ids=tokens.to(self.device),
            attention_mask=mask.to(self.device),
            stopping_criteria=[ends],
            max_new_tokens=self.config.max_new_tokens,
            **{"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0},
            eos_token_id=None,  # ends are given
            pad_token_id=self.student.config.eos_token_id,
        )
        self.counter.watching = True
        assert sequences.shape[1] - width == int(ends.limits_B.max())
        return sequences[:, width:]

    def prompt_step(self, batches: Sequence[Batch], tokens: int, iteration: int) -> dict[str, float]:
        """Losses of the global batch, whose gradients move the soft prompt once; `tokens` are those of all its responses."""
        self.prompt_optimizer.zero_grad()
        self.student.eval()
        self.teacher.train()
        base_coef = PromptKDConfig().base_coef * (1 - iteration / TOTAL_ITERS)
        sums = torch.zeros(2, device=self.device)
        for batch in batches:
            sums += self._prompt_gradient(batch, tokens, base_coef)
        with self.time("optimizer"):
            _clip_and_step(self.prompt, self.prompt_optimizer)
        kd, base = sums.tolist()
        return {"loss/prompt": kd + base_coef * base, "loss/prompt_kd": kd, "loss/prompt_base": base}

    def _prompt_gradient(self, batch: Batch, tokens: int, base_coef: float) -> Tensor:
        inputs = _as_inputs(batch)
        with self.time("prompt_step"):
            prompted = self.teacher_logits(inputs)
        with self.time("teacher"), torch.no_grad():
            base = self.teacher.base_model(**inputs, use_cache=False).logits
        with self.time("prompt_step"):
            to_base = reverse_kl(prompted, base, batch.loss_mask) / tokens
        with self.time("teacher"), torch.no_grad():
            student = self.student(**inputs, use_cache=False).logits
        with self.time("prompt_step"):
            to_student = reverse_kl(prompted, student, batch.loss_mask) / tokens
            (base_coef * to_base + to_student).backward()
        return torch.stack([to_student, to_base]).detach()

    def student_step(self, batches: Sequence[Batch], tokens: int) -> dict[str, float]:
        """The loss of the global batch, whose gradients move the student once."""
        self.optimizer.zero_grad()
        self.student.train()
        self.teacher.eval()
        loss = sum(self._student_gradient(batch, tokens) for batch in batches)
        with self.time("optimizer"):
            self.optimizer.step()
        return {"loss/reverse_kl": loss.item()}

    def _student_gradient(self, batch: Batch, tokens: int) -> Tensor:
        inputs = _as_inputs(batch)
        with self.time("student_step"):
            logits = self.student(**inputs, use_cache=False).logits
        with self.time("teacher"), torch.no_grad():
            prompted = self.teacher_logits(inputs)
        with self.time("student_step"):
            loss = reverse_kl(logits, prompted, batch.loss_mask) / tokens
            loss.backward()
        return loss.detach()

    def teacher_logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """[B, S, V]: position t predicts what the student's position t predicts."""
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}  # PEFT counts positions itself
        return self.teacher(**inputs, use_cache=False).logits[:, PromptKDConfig().prompt_len :]


def load(folder: Path, dtype: str) -> GPT2LMHeadModel:
    """`dtype` as in --dtype."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=resolve_dtype(dtype), local_files_only=True)


def with_soft_prompt(base: GPT2LMHeadModel, prompt_ids: list[int]) -> torch.nn.Module:
    """PEFT's prompt tuning around the frozen teacher, starting from word embeddings."""
    base.requires_grad_(False)
    vectors_PH = base.get_input_embeddings().weight[prompt_ids].detach().float()
    if not HAS_PEFT:
        return SoftPromptInFront(base, vectors_PH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft calls what transformers is about to rename
        model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(prompt_ids)))
    model.prompt_encoder["default"].embedding.weight.data = vectors_PH.to(base.device)
    return model


class SoftPromptInFront(torch.nn.Module):
    """What PEFT's prompt tuning computes."""

    def __init__(self, base: GPT2LMHeadModel, vectors_PH: Tensor):
        super().__init__()
        self.base_model, self.vectors_PH = base, torch.nn.Parameter(vectors_PH)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **options):
        words = self.base_model.get_input_embeddings()(input_ids)
        front = self.vectors_PH.to(words.dtype).expand(len(words), -1, -1)
        mask = torch.cat([attention_mask.new_ones(front.shape[:2]), attention_mask], 1)
        return self.base_model(inputs_embeds=torch.cat([front, words], 1), attention_mask=mask, **options)


class GivenEnds(StoppingCriteria):
    """A row ends after its own number of tokens."""

    eos_token_id = None  # that there is one makes transformers fill ended rows with padding

    def __init__(self, limits: Sequence[int], width: int, device: str):
        self.limits_B, self.width = torch.tensor(limits, device=device), width

    def __call__(self, input_ids: Tensor, scores, **_) -> Tensor:
        return input_ids.shape[1] - self.width >= self.limits_B


def left_padded(prompts: Sequence[Sequence[int]], width: int, padding: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask, [B, width]."""
    tokens = torch.tensor([[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return tokens, mask


def _as_inputs(batch: Batch) -> dict[str, Tensor]:
    real = torch.arange(batch.seq_length, device=batch.tokens.device) < batch.lengths.to(batch.tokens.device)[:, None]
    return {"input_ids": batch.tokens, "attention_mask": real.long(), "position_ids": batch.position_ids}


def reverse_kl(learning_BSV: Tensor, fixed_BSV: Tensor, mask_BS: Tensor) -> Tensor:
    """Σ KL(learning‖fixed) over masked-in positions; probabilities, logarithms and products of all positions in float32."""
    p = F.softmax(learning_BSV, dim=-1, dtype=torch.float32)
    fixed = torch.masked_fill(p * F.log_softmax(fixed_BSV, dim=-1, dtype=torch.float32), torch.isinf(fixed_BSV), 0)
    learning = torch.masked_fill(p * F.log_softmax(learning_BSV, dim=-1, dtype=torch.float32), torch.isinf(learning_BSV), 0)
    return ((learning - fixed).sum(-1) * mask_BS).sum()


class MasterWeights:
    """AdamW on float32 copies of a model's weights, as DeepSpeed keeps them for bfloat16, which would round most steps away."""

    def __init__(self, model: torch.nn.Module, lr: float):
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float().requires_grad_() if weight.dtype != torch.float32 else weight for weight in self.weights]
        self.adamw = adamw(self.masters, lr)

    def zero_grad(self) -> None:
        """Of the model's weights, where gradients are summed."""
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One clipped step, rounded into the model's weights."""
        for weight, master in zip(self.weights, self.masters):
            master.grad = weight.grad.to(master.dtype)
        _clip_and_step(self.masters, self.adamw)
        torch._foreach_copy_(self.weights, self.masters)


def adamw(parameters, lr: float) -> torch.optim.AdamW:
    """Norms and biases without decay."""
    settings, parameters = TrainingConfig(), list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(settings.adam_beta1, settings.adam_beta2), eps=settings.adam_eps)


def _clip_and_step(parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, TrainingConfig().clip_grad)
    optimizer.step()
