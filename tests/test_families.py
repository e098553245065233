"""Families whose layers differ from the common one learn as transformers' do: whole iterations in float64, at every layout."""

from __future__ import annotations

import pytest
import stories
import test_relayed_teachers
from distributed import run_distributed
from stories import story
from tasks import make_rows
from test_methods import check_stories
from test_stored_teacher import cache, cache_command, stored, trained, write_rows
from tiny import tiny_folder
from train_tokenizer import train_tokenizer

PAIRS = {  # student, teacher, as in stories.PAIRS
    "opt-350m": (
        {"family": "opt", "layers": 2, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        {"family": "opt", "layers": 3, "hidden": 96, "word_embed_proj_dim": 48, "do_layer_norm_before": False},
    ),
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


def test_hidden_states_as_narrow_as_the_head_travel(monkeypatch):
    """From a teacher of narrow words, on ranks of its own."""
    monkeypatch.setitem(test_relayed_teachers.FAMILIES, "promptkd", "opt-350m")
    monkeypatch.setattr(test_relayed_teachers, "on_one_rank", test_relayed_teachers.on_one_rank.__wrapped__)
    test_relayed_teachers.check("promptkd", test_relayed_teachers.apart("TP1", "PP2"))


def test_a_store_of_hidden_states_holds_what_the_head_reads(tmp_path):
    rows = make_rows(24, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(tmp_path / name, vocab_size=len(tokenizer), seed=seed, **PAIRS["opt-350m"][0])
        tokenizer.save_pretrained(tmp_path / name)
    for name in ("train", "valid"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    run_distributed(cache, 1, cache_command(tmp_path, "hidden"))
    (live, _), (read, _) = trained(tmp_path, "live"), trained(tmp_path, "read", **stored("hidden"))
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in zip(live, read, strict=True))
