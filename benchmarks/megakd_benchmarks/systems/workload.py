"""What every system does: the same random models learn from the same prompts, each answered by as many new tokens.

One iteration: the student samples a response to every prompt of a global batch, and learns from the teacher by KL(q‖p), token mean over the
batch, in one AdamW step. In the first two all choose the likeliest token, so that all write the same; there losses are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.config import SystemsConfig
from megakd.data.sft_dataset import SFTDataset
from megakd.data.tokenizer import load_tokenizer
from megakd.errors import UserError
from megakd_benchmarks.workload import CONTEXT, GPT2_VOCABULARY, HEAD_SIZE

CHECKED = 2  # iterations that are compared and not timed: the second sees what the first learnt
LOSS = "reverse_kl"


@dataclass(frozen=True)
class Task:
    """Prompts as text and as the tokens of that text, a tuple a global batch."""

    texts: tuple[tuple[str, ...], ...]
    prompts: tuple[tuple[tuple[int, ...], ...], ...]
    vocab_size: int

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(prompt) for batch in self.prompts for prompt in batch)


def make_task(config: SystemsConfig) -> Task:
    """CHECKED + --repetitions global batches of --data's first prompts.

    Raises:
        UserError: there are too few, or a tokenizer that the models cannot have.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    vocab_size = config.vocab_size or max(len(tokenizer), GPT2_VOCABULARY)
    if vocab_size < len(tokenizer):
        raise UserError(f"--vocab-size {vocab_size} is less than the {len(tokenizer)} tokens of --tokenizer {config.tokenizer}; raise it")
    rows = SFTDataset(config.data, tokenizer, max_length=config.max_prompt_length + 1, max_prompt_length=config.max_prompt_length)
    ids = (rows[i].prompt for i in range(len(rows)))
    # systems that are given text make tokens of it themselves
    same = [(text, prompt) for prompt in ids if tuple(tokenizer.encode(text := tokenizer.decode(prompt))) == prompt]
    batches, size = CHECKED + config.repetitions, config.global_batch_size
    if len(same) < batches * size:
        wanted = f"{batches * size} prompts of up to {config.max_prompt_length} tokens are needed"
        raise UserError(f"--data {config.data} has {len(same)}, and {wanted}; lower --repetitions or --global-batch-size")
    cut = [same[first : first + size] for first in range(0, batches * size, size)]
    texts, prompts = (tuple(tuple(pair[part] for pair in batch) for batch in cut) for part in (0, 1))
    return Task(texts, prompts, vocab_size)


def write_models(config: SystemsConfig, task: Task, folder: Path) -> None:
    """Folders `student` and `teacher` with random weights, which every system loads.

    Llamas, because TRL gives a model no position ids: where positions are learnt, as GPT-2's, it counts a prompt's padding as well.
    """
    for seed, (name, size) in enumerate(config.sizes.items()):
        torch.manual_seed(seed)
        LlamaForCausalLM(llama_config(*size, task.vocab_size)).save_pretrained(folder / name)


def llama_config(layers: int, hidden: int, vocab_size: int) -> LlamaConfig:
    """Llama of this size, word embeddings and head one matrix; no token ends a response."""
    heads = {"num_attention_heads": hidden // HEAD_SIZE, "num_key_value_heads": hidden // HEAD_SIZE}
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 64 * math.ceil(hidden / 24)}  # 8/3
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaConfig(vocab_size=vocab_size, max_position_embeddings=CONTEXT, tie_word_embeddings=True, **heads, **sizes, **ends)
