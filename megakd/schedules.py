"""Micro-batches through the pipeline stages, on megatron-core's schedules.

N supervised tokens of a micro-batch, H hidden size.

A model is any pipeline stage with a `layout` that is called with (tokens, position_ids, soft_prompt, packed_lengths) and knows the
`p2p_shape` of what it then gives to the next one: models.gpt_model's.
What comes out of the last stage is the hidden states of the supervised positions, [N, H], and never logits. A loss gets them one
micro-batch at a time and gives a value per token; values are summed here, over micro-batches and data-parallel ranks, and divided
once by the tokens of the whole global batch: a token mean, not a mean of means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megakd.data.batch import Batch
from megakd.losses.token_loss import HeadRows, TokenLoss
from megakd.runtime.parallel_layout import ParallelLayout

TOKENS = "tokens"  # the number of supervised tokens, among what is summed
LossFunction = Callable[[HeadRows, Batch, Any], TokenLoss]
"""(rows of the model that learns, micro-batch, its context) -> a loss per token. The context is what the caller gives beside each
micro-batch: the teacher's rows, for most."""


@dataclass(frozen=True)
class Windows:
    """Context that is made while it is used, where that of a whole global batch would be too much at once: how many micro-batches go
    through the pipeline together, and their context, in turn. Replicas have as many windows as each other, be they empty."""

    parts: Iterable[tuple[int, Iterable[Any]]]

    def __iter__(self) -> Iterator[Any]:
        """The context of every micro-batch, on the last stage; all of them are asked for, as every rank has a part in making them."""
        for _count, context in self.parts:
            yield from context


Context = Sequence[Any] | Windows


def forward_only(
    model: torch.nn.Module, batches: Sequence[Batch], soft_prompt: Tensor | None = None, *, keep: Callable = lambda hidden, batch: hidden
) -> list[Tensor]:
    """What `keep` leaves of the hidden states [s, b, H] of every micro-batch on the last stage, an empty list on the others.

    No dropout, no gradient.
    """

    def step(iterator, model):
        batch = next(iterator)
        return model(batch.tokens, batch.position_ids, soft_prompt, batch.packed_lengths), lambda hidden, non_loss_data: keep(hidden, batch)

    if not batches:  # a replica that has none of them to read
        return []
    with torch.no_grad(), evaluation_mode(model):
        return run_schedule(model, batches, step, soft_prompt, forward_only=True, collect_non_loss_data=True)


def supervised_hidden(model: torch.nn.Module, batches: Sequence[Batch], soft_prompt: Tensor | None = None) -> list[Tensor]:
    """What a loss needs of a model that does not learn: [N, H] of every micro-batch on the last stage."""
    return forward_only(model, batches, soft_prompt, keep=supervised)


def forward_backward(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    loss_function: LossFunction,
    *,
    layout: ParallelLayout,
    context: Context = (),
    soft_prompt: Tensor | None = None,
    names: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Gradients of Σ loss over this rank's micro-batches; token means over the global batch of what the loss logs, and the number
    of `tokens`, on every rank.

    `model` is the student in its DistributedDataParallel, or the frozen teacher when `soft_prompt` is what learns. `context` has
    one entry a micro-batch, on the last stage. `names` says what the loss logs, where a replica may have no micro-batch to find out.
    """
    sums = _run_loss(model, batches, loss_function, context, soft_prompt, forward_only=False)
    names = (*names, TOKENS) if names else layout.object_from_last_stage(tuple(sums))
    return token_means(layout.broadcast_from_last_stage(as_vector(sums, names, layout)), names[:-1], layout)


def evaluate_loss(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    loss_function: LossFunction,
    names: Sequence[str],
    context: Context = (),
    soft_prompt: Tensor | None = None,
) -> Tensor:
    """Sums of the `names` that the loss logs and, last, the token count, over this rank's micro-batches, on every stage.

    No dropout, no gradient.
    """
    with torch.no_grad(), evaluation_mode(model):
        sums = _run_loss(model, batches, loss_function, context, soft_prompt, forward_only=True)
    return model.layout.broadcast_from_last_stage(as_vector(sums, (*names, TOKENS), model.layout))


def as_vector(sums: dict[str, Tensor], names: Sequence[str], layout: ParallelLayout) -> Tensor:
    """The sums in the order of `names`; zeros on a stage that has none."""
    if not sums:
        return torch.zeros(len(names), dtype=torch.double, device=layout.device)
    return torch.stack([sums[name] for name in names])


def _run_loss(model, batches, loss_function, context, soft_prompt, *, forward_only: bool) -> dict[str, Tensor]:
    """Sums by name over the micro-batches, `tokens` last, in float64; on the last stage."""
    parts = []
    with nullcontext() if forward_only else gradients_finished_once(model):
        done = 0
        for window, beside in in_windows(batches, context):
            done += len(window)
            step = loss_step(loss_function, iter(beside), unwrap(model).output_weight, soft_prompt)
            with nullcontext() if forward_only or done == len(batches) else without_reduction(model):
                parts += run_schedule(model, window, step, soft_prompt, forward_only=forward_only) if window else []
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in (parts[0] if parts else ())}


def with_rows_beside(batches: Sequence[Batch], context: Context, read: Callable[[Sequence[Batch]], Sequence[Any]]) -> Context:
    """Each micro-batch's context, and beside it what `read` gives of the micro-batches that go through the pipeline together."""
    if not isinstance(context, Windows):
        return list(zip(context, read(batches)))
    return Windows((len(window), zip(beside, read(window))) for window, beside in in_windows(batches, context))


def in_windows(batches: Sequence[Batch], context: Context) -> Iterator[tuple[Sequence[Batch], Iterable[Any]]]:
    """Micro-batches that go through the pipeline together, and their context; None for each where there is none."""
    if not isinstance(context, Windows):
        yield batches, context or repeat(None)
        return
    first = 0
    for count, beside in context.parts:
        yield batches[first : first + count], beside
        first += count


def loss_step(loss_function: LossFunction, context: Iterator[Any], output_weight: Callable, soft_prompt: Tensor | None) -> Callable:
    """megatron's forward step of a micro-batch. Its context is asked for when the model has run, so that it can be on its way till then."""

    def step(iterator, model):
        batch = next(iterator)
        output = model(batch.tokens, batch.position_ids, soft_prompt, batch.packed_lengths)

        def loss(hidden: Tensor):
            found = loss_function(HeadRows(supervised(hidden, batch), output_weight()), batch, next(context))
            tokens = torch.full((), batch.num_supervised, dtype=torch.int, device=hidden.device)  # nobody waits
            sums = {name: value.detach().sum() for name, value in found.logs.items()} | {TOKENS: tokens}
            return found.objective_N.sum(), tokens, {name: value.double() for name, value in sums.items()}

        return output, loss

    return step


@contextmanager
def gradients_finished_once(model: torch.nn.Module) -> Iterator[None]:
    """megatron-core sums gradients over ranks and divides them by the tokens at the end of each schedule; here at the end of the last.
    The division is ours: megatron's own asks the host whether there are tokens, which waits for the device."""
    config, tokens, options = unwrap(model).config, [], {}
    finish = config.finalize_model_grads_func
    if finish is None:  # a frozen model, whose soft prompt learns
        yield
        return

    def remember(models, num_tokens, **given):
        tokens.append(num_tokens)
        options.update(given)

    config.finalize_model_grads_func = remember
    try:
        yield
    finally:
        config.finalize_model_grads_func = finish
    finish([model], None, **options)
    layout = unwrap(model).layout
    total = layout.sum_over_data_parallel(layout.broadcast_from_last_stage(sum(tokens)))
    model.scale_gradients(1.0 / total.clamp(min=1))


@contextmanager
def without_reduction(model: torch.nn.Module) -> Iterator[None]:
    """For a schedule behind which others add to the same gradients: under --overlap-grad-reduce its last micro-batch would send them."""
    config = unwrap(model).config
    no_sync = config.no_sync_func
    if no_sync is None:  # a frozen model
        yield
        return
    config.no_sync_func = nullcontext
    try:
        with no_sync():
            yield
    finally:
        config.no_sync_func = no_sync


def mean_of_means(loss_function: LossFunction, batches: Sequence[Batch], layout: ParallelLayout) -> LossFunction:
    """The loss with each micro-batch divided by its own tokens, then averaged: what the reference does, and depends on the layout."""
    mine = torch.tensor([sum(batch.num_supervised for batch in batches), len(batches)], device=layout.device)
    tokens, count = layout.sum_over_data_parallel(mine).tolist()

    def scaled(rows: HeadRows, batch: Batch, beside: Any) -> TokenLoss:
        return loss_function(rows, batch, beside).scaled(tokens / (count * max(1, batch.num_supervised)))

    return scaled


def run_schedule(
    model: torch.nn.Module,
    batches: Sequence[Batch],
    step: Callable,
    soft_prompt: Tensor | None = None,
    **options,
) -> list:
    """megatron-core's schedule for this model's pipeline; what `step`'s second half returned per micro-batch on the last stage.
    Batches are on the model's device."""
    inner = unwrap(model)
    layout = inner.layout
    if layout.pp_size > 1:
        shapes = [inner.p2p_shape(batch.tokens, soft_prompt, batch.packed_lengths) for batch in batches]
        options["p2p_communicator"] = KnownShapes(inner, shapes)
    return get_forward_backward_func(pp_size=layout.pp_size)(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=max(batch.seq_length for batch in batches),  # a bound: KnownShapes has each micro-batch's own
        micro_batch_size=batches[0].micro_batch_size,
        pg_collection=layout.groups,
        **options,
    )


class KnownShapes(P2PCommunicator):
    """Messages between stages, each micro-batch in its own shape. All stages know the batches, so no shape has to travel first,
    for which the device would be waited for. Activations come in the order of the micro-batches, and so do gradients (1F1B)."""

    def __init__(self, model: torch.nn.Module, shapes: Sequence[tuple[int, int, int]]):
        super().__init__(model.layout.pp_group, model.config)
        self.activations, self.gradients = iter(shapes), iter(shapes)

    def recv_forward(self, tensor_shapes, is_first_stage):
        return super().recv_forward([next(self.activations)], is_first_stage)

    def send_backward_recv_forward(self, input_tensor_grads, tensor_shapes, is_first_stage):
        return super().send_backward_recv_forward(input_tensor_grads, [next(self.activations)], is_first_stage)

    def recv_backward(self, tensor_shapes, is_last_stage):
        return super().recv_backward([next(self.gradients)], is_last_stage)

    def send_forward_recv_backward(self, output_tensors, tensor_shapes, is_last_stage):
        return super().send_forward_recv_backward(output_tensors, [next(self.gradients)], is_last_stage)


def supervised(hidden_SBH: Tensor, batch: Batch) -> Tensor:
    """The positions that predict a token of the response, row by row: [N, H]."""
    return hidden_SBH.transpose(0, 1).reshape(-1, hidden_SBH.shape[-1])[batch.supervised_positions]


def token_means(sums: Tensor, names: Sequence[str], layout: ParallelLayout) -> dict[str, Tensor]:
    """Means over the tokens of the global batch, and their number under `tokens`, from every replica's sums, in which it is last."""
    layout.sum_over_data_parallel(sums)
    *totals, tokens = sums
    return {name: total / tokens.clamp(min=1) for name, total in zip(names, totals)} | {TOKENS: tokens}


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside its DistributedDataParallel."""
    return model.module if hasattr(model, "module") else model


@contextmanager
def evaluation_mode(model: torch.nn.Module):
    """Dropout off, and back to what it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
