"""The model equals transformers' at every layout: hidden states times the output layer are its logits."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from tiny import tiny_config, tiny_folder, tiny_model
from transformers import AutoModelForCausalLM

from megakd.models.hf_checkpoint import HFCheckpoint
from megakd.models.model_provider import (
    build_model,
    check_layout,
    context_length,
    family_of,
    load_weights,
    padded_vocab_size,
    uneven_split,
)
from megakd.schedules import forward_only

VARIANTS = {
    "gpt2": {"family": "gpt2"},
    "opt": {"family": "opt"},
    "opt-350m": {"family": "opt", "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "opt, narrow words, own head": {"family": "opt", "word_embed_proj_dim": 32, "tie_word_embeddings": False, "_remove_final_layer_norm": True},
    "galactica": {"family": "opt", "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "llama": {"family": "llama"},
    "llama, tied": {"family": "llama", "tie_word_embeddings": True},
    "llama, one key/value head": {"family": "llama", "num_key_value_heads": 1},
    "llama, own head size": {"family": "llama", "head_dim": 32},
    "qwen2": {"family": "qwen2"},
    "qwen2, tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3"},
    "qwen3, tied, biases, one key/value head": {"family": "qwen3", "tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1},
    "mistral": {"family": "mistral", "sliding_window": 5},
    "qwen2, late layers slide": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "smollm3": {"family": "smollm3", "no_rope_layer_interval": 2, "sliding_window": 6},
    "qwen3-moe": {"family": "qwen3_moe"},
    "qwen3-moe, weights as they are": {"family": "qwen3_moe", "norm_topk_prob": False, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    "gemma3": {"family": "gemma3_text"},
    "gemma3, own head, biases, one key/value head": {
        "family": "gemma3_text", "tie_word_embeddings": False, "attention_bias": True, "num_key_value_heads": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "smollm3 that slides, one key/value head": {
        "family": "smollm3", "no_rope_layers": [1, 0, 0, 1], "use_sliding_window": True, "sliding_window": 6, "num_key_value_heads": 1, "mlp_bias": True,
    },
    "llama, biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, biases of attention alone": {"family": "llama", "attention_bias": True},
    "llama, biases of the MLP alone": {"family": "llama", "mlp_bias": True},
}
LAYOUTS = [
    (1, 1, 1, False),
    (2, 1, 1, False),
    (1, 2, 1, False),
    (2, 1, 1, True),
    (2, 2, 1, False),
    (2, 1, 2, False),
    (1, 3, 1, False),
]  # tp, pp, dp, sp


def batches():
    from megakd.data.batch import Sample, micro_batches

    generator = torch.Generator().manual_seed(3)
    samples = []
    for i, length in enumerate([17, 9, 12, 5]):
        ids = torch.randint(2, 90, (length,), generator=generator).tolist()
        samples.append(Sample(i, tuple(ids[:4]), tuple(ids[4:])))
    return micro_batches(samples, 2)


def logits_of_every_variant(layout, folders, sequence_parallel):
    """Largest difference to transformers' logits over real positions, by variant."""
    worst = {}
    for name, folder in folders.items():
        source = HFCheckpoint(folder)
        width = padded_vocab_size([source.config.vocab_size], layout.tp_size)
        model = build_model(source.config, layout, padded_vocab_size=width, sequence_parallel=sequence_parallel).eval()
        load_weights(model, source)
        reference = tiny_model(source.config)
        hidden = forward_only(model, batches())
        if layout.is_last_stage:
            worst[name] = max(difference(model, h, batch, reference, layout) for h, batch in zip(hidden, batches()))
    return worst


def difference(model, hidden, batch, reference, layout):
    local = (hidden @ model.output_weight().t()).transpose(0, 1).contiguous()
    shards = [torch.empty_like(local) for _ in range(layout.tp_size)]
    dist.all_gather(shards, local, group=layout.tp_group)
    ours = torch.cat(shards, -1)[..., : model.real_vocab_size]
    mask = torch.arange(batch.seq_length) < batch.lengths[:, None]
    with torch.no_grad():
        theirs = reference(batch.tokens, attention_mask=mask.long()).logits
    return (ours - theirs)[mask].abs().max().item()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(root / name.replace("/", "-"), **spec) for name, spec in VARIANTS.items()}


@pytest.mark.parametrize("tp, pp, dp, sequence_parallel", LAYOUTS)
def test_logits_equal_transformers(folders, tp, pp, dp, sequence_parallel):
    for worst in run_distributed(logits_of_every_variant, tp * pp * dp, folders, sequence_parallel, tp=tp, pp=pp):
        assert all(value <= 2e-6 for value in worst.values()), worst


ROPES = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8},
    "yarn, by hand": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "attention_factor": 1.7, "beta_fast": 2.0, "beta_slow": 0.5, "truncate": False,
    },
    "yarn, mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.2, "mscale_all_dim": 0.5},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.7},
}  # fmt: skip


def test_scaled_ropes_equal_transformers_beyond_the_original_context(tmp_path):
    families = ["llama", "qwen2", "qwen3", "mistral", "smollm3", "llama"]
    folders = {
        kind: tiny_folder(tmp_path / kind, family, layers=2, rope_parameters={"rope_theta": 500.0, **scaling})
        for family, (kind, scaling) in zip(families, ROPES.items(), strict=True)
    }
    (worst,) = run_distributed(logits_of_every_variant, 1, folders, False)
    assert worst.keys() == folders.keys() and all(value <= 2e-6 for value in worst.values()), worst


def test_yarn_stretches_the_context_and_dynamic_does_not():
    length = lambda **scaling: context_length(tiny_config("qwen3", rope_parameters={"rope_theta": 1e4, **scaling}))
    assert length(rope_type="yarn", factor=4.0, original_max_position_embeddings=64) == 256
    assert length(rope_type="yarn", factor=2.0, original_max_position_embeddings=16) == 64
    assert length(rope_type="yarn", factor=4.0) == 256, "the original context is then max_position_embeddings"
    assert length(rope_type="dynamic", factor=4.0) == 64 == length(rope_type="linear", factor=4.0)


def test_a_layout_that_does_not_divide_the_model_is_refused_with_the_sizes_that_do():
    xl = tiny_config("gpt2", n_head=25, hidden=1600, layers=48)
    with pytest.raises(
        ValueError, match=r"--tensor-model-parallel-size 2 does not divide the 25 attention heads.*use one of \[1, 5, 25\]"
    ):
        check_layout(xl, 2, 1, name="gpt2-xl")
    with pytest.raises(ValueError, match=r"--pipeline-model-parallel-size 5 is more than the 4 layers.*use 4 or fewer"):
        check_layout(tiny_config("llama"), 1, 5)


def test_layers_that_do_not_divide_by_the_stages_are_split_unevenly():
    for layers, pp in [(5, 2), (7, 3), (10, 4), (13, 8)]:
        first, last = uneven_split(layers, pp).values()
        assert first >= last >= 1 and (layers - first - last) % max(pp - 2, 1) == 0
    assert uneven_split(12, 4) == {}


def test_models_that_cannot_be_run_say_why():
    with pytest.raises(ValueError, match="activation_function 'silu' is not one of"):
        family_of(tiny_config("opt", activation_function="silu"))
    with pytest.raises(ValueError, match="layer_types names 'chunked_attention', which is not one of full_attention, sliding_attention"):
        family_of(tiny_config("qwen3", layers=1, layer_types=["chunked_attention"]))
    with pytest.raises(ValueError, match="no_rope_layers speaks of 2 of 4 layers"):
        family_of(tiny_config("smollm3", no_rope_layers=[1, 0], layer_types=["full_attention"] * 4))
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    with pytest.raises(ValueError, match="'longrope' is not one of"):
        family_of(tiny_config("llama", rope_parameters=longrope))


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma3_text"])
def test_a_student_made_of_a_teachers_layers_holds_their_weights(family, tmp_path, monkeypatch):
    teacher = tiny_folder(tmp_path / "teacher", family)
    script = Path(__file__).parents[1] / "scripts" / "make_student.py"
    words = [script.name, "--model", str(teacher), "--layers", "0", "3", "--save", str(tmp_path / "student")]
    monkeypatch.setattr("sys.argv", words)
    runpy.run_path(str(script), run_name="__main__")
    theirs, ours = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("teacher", "student"))
    renumbered = {name.replace(".1.", ".3.", 1): tensor for name, tensor in ours.items()}
    assert renumbered.keys() == {name for name in theirs if ".1." not in name and ".2." not in name}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in renumbered.items())
    with pytest.raises(SystemExit, match="student: is there already; give another folder"):
        runpy.run_path(str(script), run_name="__main__")
    for absent in ("-1", "4"):
        words[4], words[-1] = absent, str(tmp_path / "another")
        with pytest.raises(SystemExit, match=f"--layers {absent}: the model has layers 0 to 3"):
            runpy.run_path(str(script), run_name="__main__")
