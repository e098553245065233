"""The student's responses written by vLLM: what `--rollout-engine vllm` puts in the place of generate.py.

An engine lives on the ranks that share a layer, in their processes and on their GPUs; stages of a pipeline have one each, and share the
prompts of their replica. Before each rollout it is handed the student's weights as they are, from memory. Rules of a response are
generate.py's: ends, lengths, top-k, then top-p; noise is a function of (seed, sample and which answer to it), but vLLM's own, so that its
draws are other ones. What it says of each token, log q before temperature and cuts, comes back with the tokens, to be compared.

Written against vLLM's documentation and the source of 0.33, and tested with a stand-in for it (tests/stand_ins/vllm.py); it has not run
with vLLM itself. What is relied on, and where it is documented (docs.vllm.ai, in docs/ of its repository):

    LLM, SamplingParams, prompts as {"prompt_token_ids": ...}               serving/offline_inference, api/vllm
    collective_rpc("reload_weights", kwargs={"weights_iterator": ...})      training/layerwise: weights in place, layer after layer
    sleep(level=2), wake_up(tags=[...])                                     features/sleep_mode: memory while the models learn
    distributed_executor_backend="external_launcher"                        examples/features/torchrun: one engine over torchrun's ranks
    VLLM_ENABLE_V1_MULTIPROCESSING=0, seeds that touch the process's        usage/reproducibility
"""

from __future__ import annotations

import importlib.util
import math
import os
import random
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from megakd.checkpointing.live_tensors import live_tensors, skipped_rows
from megakd.checkpointing.model_folder import ModelFolder
from megakd.config import Config
from megakd.errors import UserError, said
from megakd.generation.answers import gather_by_index
from megakd.generation.sampling import Sampling, noise_streams
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.runtime.parallel_layout import ParallelLayout

FLAG = "--rollout-engine vllm"
LEAST = (0, 33)  # the version whose source was read
NOT_NEGATIVE = 2**63 - 1  # a seed of -1 would be none to vLLM


def check_installed() -> None:
    """
    Raises:
        UserError: there is no vLLM, or one of before the interface that is used.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError(f'{FLAG}: vllm is not installed; pip install "megakd[vllm]", or leave it out')
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST:
        least = ".".join(map(str, LEAST))
        raise UserError(f"{FLAG}: vllm {version} is installed, and {least} or later is needed; update it, or leave it out")


@dataclass(frozen=True)
class Written:
    """A response, and of each token log q as the engine has it: of the model's own distribution, before temperature, top-k and top-p."""

    tokens: list[int]
    log_probs: list[float]


class VllmEngine:
    """Writes in the place of `model`. All ranks of the student make one together.

    sleeps: the GPU's memory is given back between rollouts.
    """

    def __init__(self, model: HiddenStateGPTModel, folder: ModelFolder, config: Config, *, sleeps: bool):
        self.model, self.sleeps = model, sleeps
        self.skipped = skipped_rows(model, folder.source)
        self.differences: dict[str, float] = {}  # of the iteration in hand, to be logged
        with as_it_was(model.layout):
            self.llm = start(model, folder, config, sleeps)
            self._give_memory_back()

    @classmethod
    def beside(cls, model: HiddenStateGPTModel, folder: ModelFolder, config: Config) -> VllmEngine:
        """One that writes in the model's place from now on; on a GPU it sleeps between rollouts."""
        model.rollout_engine = cls(model, folder, config, sleeps=model.layout.device.type == "cuda")
        return model.rollout_engine

    @classmethod
    def of(cls, model: HiddenStateGPTModel) -> VllmEngine | None:
        """The one that writes in the model's place, if any."""
        return getattr(model, "rollout_engine", None)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sample_ids: Sequence[int],
        sampling: Sampling,
        *,
        eos_id: Collection[int],
        generations: Sequence[int],
    ) -> list[Written]:
        """As generate.py's of that name, on every rank of the replica, by the weights that the model has now.

        Raises:
            UserError: a model's logits are NaN or infinite.
        """
        layout = self.model.layout
        mine = range(layout.pp_rank, len(prompts), layout.pp_size)
        seeds = [stream & NOT_NEGATIVE for stream in noise_streams(sampling.seed, sample_ids, torch.device("cpu"), generations).tolist()]
        with as_it_was(layout):
            self._hand_over()
            found = self._write([prompts[i] for i in mine], [seeds[i] for i in mine], sampling, eos_id)
            self._give_memory_back()
        everyone = gather_by_index(dict(zip(mine, found)) if layout.tp_rank == 0 else {}, layout.groups.mp)
        written = [everyone[i] for i in range(len(prompts))]
        check_finite(written, sample_ids)
        return written

    def take_differences(self) -> dict[str, float]:
        """What there is to be logged since the last call."""
        taken, self.differences = self.differences, {}
        return taken

    def _hand_over(self) -> None:
        """The weights; what was kept of prompts is of the old ones."""
        if self.sleeps:
            torch.cuda.empty_cache()
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": live_tensors(self.model, self.skipped)})
        if self.sleeps:
            self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

    def _give_memory_back(self) -> None:
        if self.sleeps:
            self.llm.sleep(level=2)  # weights come anew before the next rollout

    def _write(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling, ends: Collection[int]
    ) -> list[Written]:
        """One request a row: rows with the same prompt share what is kept of it, and each has a seed of its own."""
        if not prompts:
            return []
        from vllm import SamplingParams

        shared = {
            "temperature": 0.0 if sampling.greedy else sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "stop_token_ids": sorted(ends),
            "ignore_eos": True,  # these ends and no others
            "logprobs": 0,  # of the token that was drawn, alone
            "max_tokens": sampling.max_new_tokens,  # or fewer, where prompt and response fill max_model_len
            "detokenize": False,
        }
        params = [SamplingParams(**shared, seed=seed) for seed in seeds]
        rows = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [read_output(output, ends) for output in self.llm.generate(rows, params, use_tqdm=False)]


def start(model: HiddenStateGPTModel, folder: ModelFolder, config: Config, sleeps: bool) -> Any:
    """The engine, with weights of nobody's: its `LLM`.

    Raises:
        UserError: vLLM cannot serve such a model, or lacks memory.
    """
    from vllm import LLM

    share = config.generation.vllm_gpu_memory_utilization
    try:
        return LLM(
            model=str(folder.hf_folder),
            hf_overrides={"vocab_size": model.real_vocab_size, "tie_word_embeddings": model.hf_config.tie_word_embeddings},
            skip_tokenizer_init=True,
            generation_config="vllm",  # its neutral defaults, not those of the model's folder
            load_format="dummy",
            dtype=str(model.config.params_dtype).removeprefix("torch."),
            tensor_parallel_size=model.layout.tp_size,
            distributed_executor_backend="external_launcher",
            max_model_len=config.data.max_length,
            max_num_seqs=config.generation.rollout_batch_size,
            gpu_memory_utilization=share,
            enable_sleep_mode=sleeps,
            logprobs_mode="raw_logprobs",
        )
    except ValueError as error:  # its word for a setting, a model or a device that does not fit
        way_out = f"if memory lacks, another --vllm-gpu-memory-utilization than {share:g}, or leave the engine out"
        raise UserError(f"{FLAG} does not start: {said(error)}; {way_out}") from error


def read_output(output: Any, ends: Collection[int]) -> Written:
    """What a RequestOutput of vLLM's says."""
    (answer,) = output.outputs
    tokens = list(answer.token_ids)
    assert answer.finish_reason != "stop" or tokens[-1] in ends, "vLLM leaves the end out of token_ids, which its documentation keeps"
    return Written(tokens, [step[token].logprob for step, token in zip(answer.logprobs, tokens, strict=True)])


def check_finite(responses: Sequence[Written], sample_ids: Sequence[int]) -> None:
    """
    Raises:
        UserError: a token was drawn from logits that are no numbers.
    """
    for response, sample_id in zip(responses, sample_ids):
        if not all(map(math.isfinite, response.log_probs)):
            raise UserError(
                f"{FLAG}: the response to sample {sample_id} has tokens whose logits are NaN or infinite; look for NaN in the model's "
                "weights, or use --dtype fp32"
            )


@contextmanager
def as_it_was(layout: ParallelLayout) -> Iterator[None]:
    """What vLLM finds in its process, and what it changes there is put back: the environment of a torchrun's rank, and random states,
    which it seeds."""
    device = layout.device
    given = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
    given |= {"LOCAL_RANK": str(device.index)} if device.type == "cuda" else {}
    before, states = dict(os.environ), (random.getstate(), np.random.get_state())
    os.environ.update(given)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for name in given:
            os.environ.pop(name)
        os.environ.update({name: before[name] for name in given if name in before})
