"""SmolLM3: Llama, some of whose layers turn no queries and keys; where its config says so, these attend to a window."""

from __future__ import annotations

from transformers import SmolLM3Config

from megakd.models import llama
from megakd.models.family import Family


def unsupported(hf: SmolLM3Config) -> str | None:
    if (said := len(hf.no_rope_layers)) < hf.num_hidden_layers:
        return f"no_rope_layers speaks of {said} of {hf.num_hidden_layers} layers; give the config.json that the weights were saved with"
    return llama.unsupported(hf)


def transformer_config(hf: SmolLM3Config) -> dict:
    without = [int(not turns) for turns in hf.no_rope_layers[: hf.num_hidden_layers]]  # Hugging Face's 1 is a layer that turns them
    return llama.transformer_config(hf) | llama.sliding(hf) | {"no_rope_freq": without}


FAMILY = Family("smollm3", unsupported, transformer_config, llama.model_arguments, llama.table, skipped_rows={})
