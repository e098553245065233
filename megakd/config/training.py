"""How the student is trained, whatever it learns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from megakd.config.fields import NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_1, alias, flag
from megakd.config.reference_compat import ReferenceBehaviour, ReferenceCompat


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Batch, length of the run, optimizer."""

    micro_batch_size: Annotated[int, alias("--mbs")] = flag(2, "rows of one forward pass on one rank", range=POSITIVE)
    micro_batch_tokens: int | None = flag(
        None, "positions of one forward pass on one rank, a further limit beside --micro-batch-size", range=POSITIVE
    )
    pack: bool = flag(
        False,
        "rows of a micro-batch stand one behind the other without padding, attention stays inside each; the same numbers, "
        "but those that --reference-behaviour mean-of-means makes depend on micro-batches",
    )
    global_batch_size: Annotated[int, alias("--gbs")] = flag(32, "rows of one optimizer step over all ranks", range=POSITIVE)
    train_iters: Annotated[int | None, alias("--max-steps")] = flag(None, "optimizer steps; or give --epochs", range=POSITIVE)
    epochs: Annotated[int | None, alias("--num-train-epochs")] = flag(
        None, "passes over the training data; or give --train-iters", range=POSITIVE
    )
    lr: Annotated[float, alias("--learning-rate")] = flag(5e-5, "the student's highest learning rate", range=POSITIVE)
    min_lr: float = flag(0.0, "where the decay ends", range=NOT_NEGATIVE)
    lr_warmup_iters: Annotated[int, alias("--warmup-iters")] = flag(0, "iterations of linear warm-up", range=NOT_NEGATIVE)
    lr_decay_style: Literal["constant", "linear", "cosine"] = flag("cosine", "how the learning rate falls after the warm-up")
    optimizer: Literal["adamw", "sgd"] = flag("adamw", "the student's; a soft prompt has AdamW in any case")
    momentum: Annotated[float, alias("--sgd-momentum")] = flag(
        0.9, "SGD's, as torch's: v ← momentum · v + gradient, θ ← θ − lr · v", range=SHARE_BELOW_1
    )
    weight_decay: float = flag(0.01, "AdamW's, or in SGD added to the gradient; norms and biases have none", range=NOT_NEGATIVE)
    adam_beta1: float = flag(0.9, "AdamW's first moment", range=SHARE_BELOW_1)
    adam_beta2: float = flag(0.999, "AdamW's second moment", range=SHARE_BELOW_1)
    adam_eps: float = flag(1e-8, "AdamW's epsilon", range=POSITIVE)
    clip_grad: float = flag(1.0, "largest global gradient norm; 0: no clipping", range=NOT_NEGATIVE)
    recompute: bool = flag(False, "recompute each layer's activations in the backward pass: less memory, a third more work")
    gradient_accumulation_fusion: bool = flag(
        False, "linear layers add their weights' gradients to the float32 sums within the matrix product, unrounded; Apex's where it is"
    )
    deterministic_mode: Annotated[bool, alias("--deterministic")] = flag(
        False, "on the same GPUs the same bits in every run: deterministic kernels and rings, which are slower; a CPU needs no flag"
    )
    reference_behaviour: tuple[ReferenceBehaviour, ...] = flag(
        (), "do as PromptKD's code does, by name or all; docs/fidelity.md explains each"
    )
    seed: int = flag(
        1234, "of data order, dropout, prompt and sampling; of these the layout changes dropout's masks alone", range=SEED
    )

    @cached_property
    def reference_compat(self) -> ReferenceCompat:
        """--reference-behaviour, resolved."""
        return ReferenceCompat.asked_for(self.reference_behaviour)
