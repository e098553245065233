"""Rollouts: the student writes the responses it is going to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megakd.config import Config
from megakd.data.batch import Sample
from megakd.data.end_ids import EndIds
from megakd.generation.generate import generate
from megakd.generation.mixture import MixtureComponent
from megakd.generation.room import Rooms
from megakd.generation.sampling import Sampling
from megakd.generation.vllm_engine import VllmEngine
from megakd.methods.agreement import log_prob_differences
from megakd.models.gpt_model import HiddenStateGPTModel

SEED_STRIDE = 1_000_003  # a run's iterations draw other noise than a run with the next seed


def rollout(
    student: HiddenStateGPTModel,
    samples: Sequence[Sample],
    config: Config,
    ends: EndIds,
    iteration: int,
    *,
    mix_with: Sequence[MixtureComponent] = (),
) -> list[Sample]:
    """The samples with responses of the student, or of a mixture with it; the end included where one was written.

    The noise is a function of (seed, iteration, sample and which answer to it, position): any layout and batch size writes the same.
    Where vLLM writes (`--rollout-engine vllm`), its log q are compared with the student's; no method uses them in place of its own.
    """
    settings = config.generation
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=config.training.seed * SEED_STRIDE + iteration,
    )
    asked = [sample.prompt for sample in samples], [sample.sample_id for sample in samples], sampling
    generations = [sample.generation for sample in samples]
    if engine := VllmEngine.of(student):
        written = engine.generate(*asked, eos_id=ends.stop, generations=generations)
        responses = [one.tokens for one in written]
        answered = [replace(sample, response=tuple(response)) for sample, response in zip(samples, responses)]
        engine.differences = log_prob_differences(student, answered, [one.log_probs for one in written], config)
    else:
        responses = generate(
            student, *asked, eos_id=ends.stop, batch_size=settings.rollout_batch_size, mix_with=mix_with, generations=generations
        )
    if settings.release_decode_cache:
        Rooms.of(student).release()
    if config.training.reference_compat.forced_eos:
        cut_off = lambda response: len(response) == config.max_new_tokens and response[-1] not in ends.stop
        responses = [[*response[:-1], ends.taught] if cut_off(response) else response for response in responses]
    return [replace(sample, response=tuple(response)) for sample, response in zip(samples, responses)]
