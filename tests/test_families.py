"""Families whose layers differ from the common one learn as transformers' do: whole iterations in float64, at every layout."""

from __future__ import annotations

import pytest
import stories
from distributed import run_distributed
from stories import story
from test_methods import check_stories

PAIRS = {  # student, teacher, as in stories.PAIRS
    "qwen3": (
        {"family": "qwen3", "layers": 2, "num_key_value_heads": 1, "pad_token_id": 1},
        {"family": "qwen3", "layers": 3, "hidden": 96, "tie_word_embeddings": True},
    ),
    "smollm3 of a mistral": (
        {"family": "smollm3", "layers": 2, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 5, "pad_token_id": 1},
        {"family": "mistral", "layers": 2, "sliding_window": 4},
    ),
}
LAYOUTS = {"TP1": (1, 1, False, 4), "TP2": (2, 1, False, 4), "PP2": (1, 2, False, 2), "TP2 PP2 SP": (2, 2, True, 2)}


@pytest.fixture(autouse=True)
def pairs(monkeypatch):
    for name, pair in PAIRS.items():
        monkeypatch.setitem(stories.PAIRS, name, pair)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_iterations_equal_float64_transformers(layout, pair):
    """PromptKD's: the student learns, and the gradient of a soft prompt passes the teacher."""
    tp, pp, sequence_parallel, micro_batch_size = LAYOUTS[layout]
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": sequence_parallel}
    told = [("promptkd", pair, story("promptkd", pair))]
    run_distributed(check_stories, tp * pp, told, micro_batch_size, parallel, tp=tp, pp=pp)
