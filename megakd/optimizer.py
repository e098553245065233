"""Two learners: the student on megatron-core's optimizer (AdamW or SGD), and the soft prompt, a few vectors, on torch's AdamW.

The learning rate is a function of the iteration alone, so that nothing of it has to be saved.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import ParamGroupOverride

from megakd.config import TrainingConfig


def learning_rate(iteration: int, *, lr: float, total_iters: int, config: TrainingConfig) -> float:
    """Linear warm-up to `lr`, then constant, linear or cosine decay that would meet `min_lr` one iteration after the last: every
    iteration moves. Never upwards. Iterations count from 1.

    The first iteration already moves, by lr · 1/warm-up; with the reference's `zero-lr-start` its learning rate is 0.
    """
    iteration -= config.reference_compat.zero_lr_start
    if iteration < config.lr_warmup_iters:
        return lr * iteration / config.lr_warmup_iters
    if config.lr_decay_style == "constant":
        return lr
    progress = max(0, iteration - config.lr_warmup_iters - 1) / max(1, total_iters - config.lr_warmup_iters)
    left = 1 - progress if config.lr_decay_style == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    lowest = min(config.min_lr, lr)  # --teacher-lr may lie below it
    return lowest + (lr - lowest) * left


class StudentOptimizer:
    """The student inside DistributedDataParallel, its gradients and its AdamW or SGD (fp32 master weights under bf16).

    Norms and biases of every family are kept from weight decay.

    Args:
        distributed: whether data-parallel ranks share the optimizer's state.
        overlap: whether gradients travel while the backward pass runs.
    """

    def __init__(self, model: torch.nn.Module, config: TrainingConfig, *, total_iters: int, distributed: bool, overlap: bool = False):
        self.config, self.total_iters = config, total_iters
        options = {"use_distributed_optimizer": distributed, "overlap_grad_reduce": overlap}
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **options)
        self.ddp = DistributedDataParallel(model.config, ddp_config, model, pg_collection=model.layout.groups)
        assert all(param.is_contiguous() for param in model.parameters()), "torch's fused AdamW takes any other for another tensor"
        model.sum_words_by_rows(awaited=overlap)
        settings = _optimizer_config(config, model.config.params_dtype, distributed)
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            settings,
            [self.ddp],
            self._weight_decay_overrides(model, settings),
            use_gloo_process_groups=False,
            pg_collection=model.layout.groups,
        )
        self._grad_norm, self.optimizer.get_grad_norm = self.optimizer.get_grad_norm, self._finite_norm
        for part in self.optimizer.chained_optimizers:  # upstream knows this group from its global state alone
            part.data_parallel_group_gloo = model.layout.host_dp_group
            part.init_state_fn = part.init_state_fn or _begin_momentum  # upstream has none for SGD, and calls it to load a checkpoint
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss
        model.config.no_sync_func = self.ddp.no_sync

    def _weight_decay_overrides(self, model: torch.nn.Module, settings: OptimizerConfig) -> dict:
        """Norms and biases have no decay. The reference names GPT-2's norms alone, and so decays those of other families."""
        if self.config.reference_compat.decay_norms and model.hf_config.model_type != "gpt2":
            return {ParamKey(name="*.bias"): ParamGroupOverride(wd_mult=0.0)}
        return get_standard_config_overrides(settings)

    def zero_grad(self) -> None:
        """DistributedDataParallel's gradient buffer, which every backward pass adds to, and the master weights' gradients."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, iteration: int) -> dict[str, float]:
        """One step with the iteration's learning rate; none where the gradient's norm is NaN or infinite, which is returned."""
        lr = learning_rate(iteration, lr=self.config.lr, total_iters=self.total_iters, config=self.config)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, self.config.weight_decay * group["wd_mult"]
        for part in self.optimizer.chained_optimizers:
            choose_kernel(part.optimizer)
        try:
            finite, grad_norm, _ = self.optimizer.step()
        except NonFiniteNormError as error:
            return {"grad_norm": error.norm, "lr": lr}
        assert finite, "fp16 is not built: bf16 and fp32 never skip a step"
        return {"grad_norm": float(grad_norm), "lr": lr}

    def _finite_norm(self) -> float:
        """Of the whole gradient; megatron-core asks for it before it clips, and steps only then."""
        norm = float(self._grad_norm())
        if not math.isfinite(norm):
            raise NonFiniteNormError(norm)
        return norm


class NonFiniteNormError(ArithmeticError):
    """The gradient's norm is NaN or infinite; nothing was changed yet."""

    def __init__(self, norm: float):
        super().__init__(f"the gradient's norm is {norm}")
        self.norm = norm


def choose_kernel(optimizer: torch.optim.Optimizer) -> None:
    """torch's AdamW in one pass over weights, gradients and moments, which otherwise writes each intermediate; its counters lie beside
    the moments.

    Asked before every step: a checkpoint brings counters and choice of the device that it was written on.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        group["fused"] = True
        for state in (optimizer.state[param] for param in group["params"] if "step" in optimizer.state[param]):
            state["step"] = state["step"].to(state["exp_avg"].device)


def without_a_student() -> None:
    """The part of a rank without the model in making a StudentOptimizer: megatron-core compares parameter groups over the whole job,
    those of dense layers and those of experts."""
    for _ in ("dense", "experts"):
        dist.all_gather_object([None] * dist.get_world_size(), [])


def _optimizer_config(config: TrainingConfig, dtype: torch.dtype, distributed: bool) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="sgd" if config.optimizer == "sgd" else "adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_eps,
        sgd_momentum=config.momentum,
        clip_grad=config.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
    )


def _begin_momentum(optimizer: torch.optim.Optimizer, config: OptimizerConfig | None = None) -> None:
    """Room for what a checkpoint holds of every weight. A momentum of 0 is none."""
    for group in optimizer.param_groups:
        for param in group["params"] if group["momentum"] else []:
            if optimizer.state[param].get("momentum_buffer") is None:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)


class SoftPromptOptimizer:
    """AdamW on the soft prompt alone. The frozen teacher has no gradient, no optimizer state and no gradient buffer."""

    def __init__(self, prompt: torch.nn.Module, config: TrainingConfig, *, lr: float, total_iters: int):
        self.prompt, self.config, self.lr, self.total_iters = prompt, config, lr, total_iters
        betas = (config.adam_beta1, config.adam_beta2)
        self.adam = torch.optim.AdamW(
            prompt.parameters(), lr=lr, betas=betas, eps=config.adam_eps, weight_decay=config.weight_decay
        )

    def zero_grad(self) -> None:
        """None, not zeros: on a stage that does not read the prompt it stays None."""
        self.adam.zero_grad()

    def clip(self, tokens: torch.Tensor) -> torch.Tensor:
        """The gradient becomes that of Σ loss / `tokens` of the global batch, the same on every rank, and no longer than the limit.
        Returns its norm before, which whoever steps looks at: where it is NaN or infinite there is to be no step."""
        self.prompt.synchronize_gradient(tokens)
        return torch.nn.utils.clip_grad_norm_(self.prompt.parameters(), self.config.clip_grad or math.inf)

    def step(self, iteration: int) -> None:
        """One step on the gradient, with the iteration's learning rate."""
        choose_kernel(self.adam)
        self.adam.param_groups[0]["lr"] = learning_rate(iteration, lr=self.lr, total_iters=self.total_iters, config=self.config)
        self.adam.step()

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """The prompt and its moments by name: a checkpoint saves them, and fills them in place."""
        vectors = self.prompt.vectors
        state = self.adam.state[vectors]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(vectors), "exp_avg_sq": torch.zeros_like(vectors)}
        return {"vectors": vectors.detach(), **state}
