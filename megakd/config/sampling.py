"""How responses are written: by the student as it learns, and by a model that is asked to answer."""

from __future__ import annotations

from dataclasses import dataclass

from megakd.config.fields import NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, TEMPERATURE_OR_0, TEMPLATE_HELP, flag


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
