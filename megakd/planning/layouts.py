"""Which TP × PP × DP a run can have on so many cards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from megakd.config.plan import PlanConfig
from megakd.errors import UserError
from megakd.memory import state_bytes
from megakd.models.model_provider import check_layout, padded_vocab_size
from megakd.models.sizes import stage_sizes
from megakd.simulation.cards import CARDS

PER_NODE = 8  # cards that tensor parallelism may span


@dataclass(frozen=True, order=True)
class Layout:
    """Sizes; TP × PP × DP cards."""

    tp: int
    pp: int
    dp: int

    def __str__(self) -> str:
        return f"TP {self.tp} × PP {self.pp} × DP {self.dp}"


def layouts_of(config: PlanConfig, models: dict[str, PretrainedConfig]) -> list[Layout]:
    """The one that the flags give; with --rank-layouts all on the cards at hand.

    Raises:
        UserError: there is none.
    """
    given = config.parallel
    tp, pp = given.tensor_model_parallel_size, given.pipeline_model_parallel_size
    cards = config.plan.gpus or tp * pp
    if config.plan.rank_layouts:
        most = config.plan.most_stages or cards
        found = [layout for layout in possible(cards, config.training.global_batch_size, models) if layout.pp <= most]
        found = [layout for layout in found if can_fit(config, models, layout)] or found[-1:]
        if not found:
            raise UserError(f"--gpus {cards}: no TP × PP × DP of so many fits the models and --global-batch-size; use another number")
        return found
    for flag, model in models.items():
        check_layout(model, tp, pp, flag=flag)
    if cards % (tp * pp):
        raise UserError(f"--gpus {cards} is no multiple of TP {tp} × PP {pp} = {tp * pp}; use one, or --rank-layouts")
    dp = cards // (tp * pp)
    if config.training.global_batch_size % dp:
        rows = config.training.global_batch_size
        raise UserError(f"--global-batch-size {rows} is no multiple of the {dp} replicas on --gpus {cards}; use one")
    return [Layout(tp, pp, dp)]


def can_fit(config: PlanConfig, models: dict[str, PretrainedConfig], layout: Layout) -> bool:
    """Whether what stays between iterations leaves any room on a card: weights, float32 gradients and what the optimizer has of each. Where
    it does not, nothing has to be simulated."""
    student, *teacher = models.values()
    padded = padded_vocab_size([model.vocab_size for model in models.values()], layout.tp)
    place = {"padded_vocab_size": padded, "tp": layout.tp, "pp": layout.pp}
    size = lambda model: max(stage_sizes(model, stage=i, **place).parameters for i in range(layout.pp))
    number = 4 if config.models.dtype == "fp32" else 2
    trained = 0 if config.lora.rank else size(student)
    state = state_bytes(config, number) / (layout.dp if config.parallel.use_distributed_optimizer else 1)
    frozen = 0 if config.teacher_parallel.teacher_offload else sum(map(size, teacher))
    stays = number * (size(student) + frozen) + trained * (4 + state)
    return stays < CARDS[config.plan.gpu].memory_gib * 2**30


def possible(cards: int, rows: int, models: dict[str, PretrainedConfig]) -> Iterator[Layout]:
    """All that both models take, with whole shares of a global batch of `rows`; layers are split evenly."""
    for tp in divisors(min(cards, PER_NODE)):
        for pp in divisors(cards // tp) if cards % tp == 0 else ():
            dp = cards // (tp * pp)
            if rows % dp == 0 and all(fits(model, tp, pp) for model in models.values()):
                yield Layout(tp, pp, dp)


def fits(model: PretrainedConfig, tp: int, pp: int) -> bool:
    """Whether a model can be spread so."""
    try:
        check_layout(model, tp, pp)
    except UserError:
        return False
    return model.num_hidden_layers % pp == 0


def divisors(number: int) -> list[int]:
    """From 1 up."""
    return [n for n in range(1, number + 1) if number % n == 0]
