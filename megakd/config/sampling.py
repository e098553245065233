"""How responses are written: by the student as it learns, and by a model that is asked to answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megakd.config.fields import NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, TEMPERATURE_OR_0, TEMPLATE_HELP, flag

if TYPE_CHECKING:
    from megakd.config.train import Config

COLDEST_OF_VLLM, HOTTEST_OF_VLLM = 0.01, 2.0  # it draws at the first where a temperature is below, and refuses one above the second


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn."""

    temperature: float = flag(1.0, "of sampling alone, never of a loss", range=TEMPERATURE_OR_0, read_by="writes_responses")
    top_k: int = flag(0, "sample among the k likeliest tokens; 0: all", range=NOT_NEGATIVE, read_by="writes_responses")
    top_p: float = flag(
        1.0,
        "sample among the likeliest tokens that hold this probability; 1: all",
        range=POSITIVE_SHARE,
        read_by="writes_responses",
    )


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(SamplingConfig):
    """How the student writes its responses (on-policy methods)."""

    max_new_tokens: int | None = flag(
        None, "longest response; default: --max-length minus --max-prompt-length", range=POSITIVE
    )
    num_generations: int = flag(
        1, "answers to each prompt; --global-batch-size counts answers", range=POSITIVE, read_by="answers_prompts_often"
    )
    rollout_batch_size: int = flag(64, "rows decoded together", range=POSITIVE, read_by="writes_responses")
    release_decode_cache: bool = flag(
        False, "give a rollout's cache back while the models learn: less memory, steps captured anew (a GPU's)", read_by="writes_responses"
    )
    rollout_engine: Literal["megakd", "vllm"] = flag(
        "megakd",
        "who writes the student's responses; vllm: an engine of vLLM's in the same processes, which is handed the weights before each "
        "rollout (docs/generation.md)",
        read_by="student_writes",
    )
    vllm_gpu_memory_utilization: float = flag(
        0.3, "share of each GPU's memory that vLLM takes while it writes", range=POSITIVE_SHARE, read_by="student_writes"
    )

    def validation_errors(self, config: Config) -> Iterator[str]:
        """What vLLM cannot do, one line each."""
        if self.rollout_engine != "vllm":
            return
        given = f"--rollout-engine {self.rollout_engine}"
        if not COLDEST_OF_VLLM <= self.temperature <= HOTTEST_OF_VLLM:
            bounds = f"temperatures from {COLDEST_OF_VLLM} to {HOTTEST_OF_VLLM:g}"
            yield f"{given} draws at {bounds}, and --temperature is {self.temperature:g}; give one of these, or leave the engine out"
        if config.training.deterministic_mode:
            yield f"{given}: vLLM's sums depend on what else is in its batch, and --deterministic-mode bars that; leave one of them out"
        if ranks := config.teacher_parallel.teacher_ranks:
            yield f"{given} forms groups of all ranks, and the teacher's (--teacher-ranks {ranks}) take no part; leave one of them out"


@dataclass(frozen=True, kw_only=True)
class ResponseConfig(SamplingConfig):
    """How prompts are answered."""

    prompt_template: str = flag("alpaca", TEMPLATE_HELP, path=True)
    max_prompt_length: int = flag(256, "tokens of a prompt; rows with a longer one are left out", range=POSITIVE)
    max_new_tokens: int = flag(256, "longest response", range=POSITIVE)
    greedy: bool = flag(False, "the likeliest token each time, nothing random")
    repetition_penalty: float = flag(
        1.0, "divides the logits of tokens that the row holds (multiplies negative ones); 1: off", range=POSITIVE
    )
    no_repeat_ngram_size: int = flag(
        0, "no token that completes a run of so many tokens a second time; 0: no limit", range=NOT_NEGATIVE
    )
    batch_size: int = flag(64, "rows answered together on one replica", range=POSITIVE)
