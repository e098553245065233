"""A stand-in for vLLM: of its interface, as 0.33 documents it, what megakd asks for, on transformers.

It samples with the parameters that it is given, by the weights that it was given last, and takes nothing that vLLM does not know: other
names of arguments are TypeErrors. Where vLLM would go wrong in silence it complains, or goes wrong where a test sees it: it keeps what it
has made of a prompt until the prefix cache is reset, loses its weights and its cache when it sleeps, seeds the process's generators, and
ends at the model's own end ids unless it is told not to.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass
class SamplingParams:
    """Names, defaults and limits of vllm.SamplingParams."""

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True

    def __post_init__(self):
        if 0 < self.temperature < 1e-2:
            self.temperature = 1e-2
        self.seed = None if self.seed == -1 else self.seed
        assert 0 <= self.temperature <= 2 and 0 < self.top_p <= 1 and self.top_k >= -1 and self.max_tokens >= 1
        assert (self.n, self.repetition_penalty, self.min_p) == (1, 1.0, 0.0), "not built here"


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class LLM:
    """Arguments are vllm.LLM's and vllm.EngineArgs', with their defaults."""

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    seed: int = 0
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    hf_overrides: dict = field(default_factory=dict)
    load_format: str = "auto"
    distributed_executor_backend: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    enable_sleep_mode: bool = False
    logprobs_mode: str = "raw_logprobs"
    generation_config: str = "auto"

    def __post_init__(self):
        assert self.distributed_executor_backend == "external_launcher", "an engine in a torchrun's rank has no other"
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "To get deterministic execution, please set VLLM_ENABLE_V1_MULTIPROCESSING=0"
        assert (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) == (dist.get_rank(), dist.get_world_size()) and "LOCAL_RANK" in os.environ
        if self.gpu_memory_utilization > 0.95:
            raise ValueError("Free memory on device (75.0/80.0 GiB) on startup is less than desired GPU memory utilization")
        assert self.skip_tokenizer_init and self.load_format == "dummy", "not built here"
        ranks = torch.arange(dist.get_world_size()).view(-1, self.tensor_parallel_size).tolist()  # neighbours share a layer
        self.group = next(group for group, members in [(dist.new_group(m), m) for m in ranks] if dist.get_rank() in members)
        random.seed(self.seed), np.random.seed(self.seed), torch.manual_seed(self.seed)
        self.config = AutoConfig.from_pretrained(self.model)
        self.config.update(self.hf_overrides)
        self.torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        self.weights = AutoModelForCausalLM.from_config(self.config, dtype=self.torch_dtype).eval()
        self.asleep, self.kept = set(), {}
        self.max_model_len = self.max_model_len or self.config.max_position_embeddings

    # ---- what an engine is told to do beside generating

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = (), kwargs: dict | None = None) -> list:
        assert method == "reload_weights", f"no method {method} of vLLM's worker"
        return [self._reload_weights(*args, **kwargs or {})]

    def _reload_weights(self, weights_iterator: Iterable | None = None, weights_path: str | None = None, is_checkpoint_format: bool = True):
        assert "weights" not in self.asleep, "wake up the weights before they are loaded"
        assert weights_iterator is not None and weights_path is None and is_checkpoint_format, "not built here"
        given = [(name, tensor.clone()) for name, tensor in weights_iterator]
        tensors = dict(given)
        assert len(tensors) == len(given) and {tensor.dtype for tensor in tensors.values()} == {self.torch_dtype}
        with tempfile.TemporaryDirectory() as folder:
            self.config.save_pretrained(folder)
            save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=self.torch_dtype, attn_implementation="eager", output_loading_info=True)
        self.weights, told = loaded
        wrong = {kind: names for kind, names in told.items() if names}
        assert not wrong, f"weights that do not belong together: {wrong}"

    def reset_prefix_cache(self) -> bool:
        self.kept.clear()
        return True

    def sleep(self, level: int = 1) -> None:
        assert self.enable_sleep_mode and level == 2, "not built here"
        self.asleep, self.weights = {"weights", "kv_cache"}, None
        self.kept.clear()

    def wake_up(self, tags: list[str] | None = None) -> None:
        assert self.enable_sleep_mode and set(tags or ()) <= {"weights", "kv_cache"}
        self.asleep -= set(tags or self.asleep)

    # ---- generation

    def generate(
        self, prompts: Sequence[dict], sampling_params: Sequence[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        assert not self.asleep, f"{self.asleep} asleep"
        assert all(isinstance(token, int) and 0 <= token < self.config.vocab_size for prompt in prompts for token in prompt["prompt_token_ids"])
        everyone = [None] * self.group.size()
        dist.all_gather_object(everyone, (prompts, sampling_params), group=self.group)
        assert all(one == everyone[0] for one in everyone), "ranks of one engine were given other requests"
        torch.rand(1)  # as what vLLM runs may
        return [self._answer(str(i), *request) for i, request in enumerate(zip(prompts, sampling_params, strict=True))]

    @torch.no_grad()
    def _answer(self, number: str, prompt: dict, params: SamplingParams) -> RequestOutput:
        ids = prompt["prompt_token_ids"]
        assert 0 < len(ids) < self.max_model_len
        generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
        own_ends = set() if params.ignore_eos else {self.config.eos_token_id}
        tokens, noted, reason = [], [], "length"
        while len(tokens) < params.max_tokens and len(ids) + len(tokens) < self.max_model_len:
            logits = self._logits((*ids, *tokens)) if tokens else self._first(tuple(ids))
            token = draw(logits, params, generator)
            tokens.append(token)
            shown = logits if self.logprobs_mode == "raw_logprobs" else processed(logits, params)
            noted.append({token: Logprob(shown.log_softmax(-1)[token].item())})
            if token in own_ends | set(params.stop_token_ids or ()):
                reason = "stop"
                break
        said = None if params.logprobs is None else noted
        assert not params.detokenize, "without a tokenizer there is no text"
        return RequestOutput(number, None, ids, [CompletionOutput(0, "", tokens, None, said, reason, tokens[-1] if reason == "stop" else None)])

    def _first(self, ids: tuple[int, ...]) -> torch.Tensor:
        if ids not in self.kept:
            self.kept[ids] = self._logits(ids)
        return self.kept[ids]

    def _logits(self, ids: tuple[int, ...]) -> torch.Tensor:
        return self.weights(torch.tensor([ids])).logits[0, -1].float()


def processed(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Temperature, the k likeliest, then the fewest that hold p of what is left."""
    logits = logits / (params.temperature or 1.0)
    if params.top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(min(params.top_k, len(logits))).values[-1], -torch.inf)
    if params.top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        logits[order[p.cumsum(-1) - p >= params.top_p]] = -torch.inf
    return logits


def draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator | None) -> int:
    """A token; the likeliest at temperature 0."""
    if params.temperature == 0:
        return int(logits.argmax())
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return int((processed(logits, params).softmax(-1) / noise).argmax())
