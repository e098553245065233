"""Families whose layers differ from the common one learn as transformers' do: whole iterations in float64, at every layout."""

from __future__ import annotations

import pytest
import stories
import test_relayed_teachers
import torch
from distributed import run_distributed
from oracle import StateDictSource
from stories import story
from tasks import make_rows
from test_methods import check_stories
from test_stored_teacher import cache, cache_command, stored, trained, write_rows
from test_trainer import command, numbers, run
from tiny import tiny_config, tiny_folder, tiny_model
from train_tokenizer import train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.soft_prompt_folder import SoftPromptFolder
from megakd.errors import UserError
from megakd.generation import rows
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.models.model_provider import build_model, family_of, load_weights
from megakd.models.soft_prompt import word_embeddings

PAIRS = {  # student, teacher, as in stories.PAIRS
    "opt-350m": (
        {"family": "opt", "layers": 2, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
        {"family": "opt", "layers": 3, "hidden": 96, "word_embed_proj_dim": 48, "do_layer_norm_before": False},
    ),
    "qwen3": (
        {"family": "qwen3", "layers": 2, "num_key_value_heads": 1, "pad_token_id": 1},
        {"family": "qwen3", "layers": 3, "hidden": 96, "tie_word_embeddings": True},
    ),
    "gemma3": (
        {"family": "gemma3_text", "layers": 2, "num_key_value_heads": 1, "pad_token_id": 1},
        {"family": "gemma3_text", "layers": 2, "hidden": 96, "pad_token_id": 1},
    ),
    "qwen3-moe": (
        {"family": "qwen3_moe", "layers": 2, "pad_token_id": 1},
        {"family": "qwen3_moe", "layers": 2, "hidden": 96, "norm_topk_prob": False, "pad_token_id": 1},
    ),
    "smollm3 of a mistral": (
        {"family": "smollm3", "layers": 2, "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 5, "pad_token_id": 1},
        {"family": "mistral", "layers": 2, "sliding_window": 4},
    ),
}
LAYOUTS = {"TP2": (2, 1, False, 4), "PP2": (1, 2, False, 2), "TP2 PP2 SP": (2, 2, True, 2)}


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


def write_inputs(root, spec) -> None:
    """A student, a teacher like it, and data."""
    texts = make_rows(24, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in texts])
    for seed, name in enumerate(("student", "teacher")):
        tiny_folder(root / name, vocab_size=len(tokenizer), seed=seed, **spec)
        tokenizer.save_pretrained(root / name)
    for name in ("train", "valid"):
        write_rows(root / f"{name}.jsonl", texts)


def test_a_store_of_hidden_states_holds_what_the_head_reads(tmp_path):
    write_inputs(tmp_path, PAIRS["opt-350m"][0])
    run_distributed(cache, 1, cache_command(tmp_path, "hidden"))
    (live, _), (read, _) = trained(tmp_path, "live"), trained(tmp_path, "read", **stored("hidden"))
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in zip(live, read, strict=True))


def test_a_soft_prompt_is_as_wide_as_the_words_in_front_of_which_it_stands(tmp_path):
    write_inputs(tmp_path, PAIRS["opt-350m"][0])
    run_distributed(run, 2, command(tmp_path, "prompted", "promptkd", **{"train-iters": 1}), tp=2)
    prompt, teacher = SoftPromptFolder.read(tmp_path / "prompted" / "soft_prompt"), ModelFolder.open(tmp_path / "teacher")
    prompt.check(teacher)
    with pytest.raises(UserError, match=r"has vectors of 64 numbers, and .* embeddings of 32; give the model"):
        SoftPromptFolder(tmp_path, torch.zeros(7, 64)).check(teacher)


def test_a_sparse_models_run_goes_on_at_another_layout_and_is_exported(tmp_path):
    write_inputs(tmp_path, PAIRS["qwen3-moe"][0])
    cut, staged = {"tensor-model-parallel-size": 2, "sequence-parallel": True}, {"pipeline-model-parallel-size": 2}
    distributed = {"use-distributed-optimizer": True}
    run_distributed(run, 1, command(tmp_path, "unbroken", "sft"))
    run_distributed(run, 2, command(tmp_path, "moved", "sft", **cut, **distributed), 4)
    run_distributed(run, 2, command(tmp_path, "moved", "sft", **staged, **distributed))
    for one, other in zip(numbers(tmp_path / "unbroken"), numbers(tmp_path / "moved"), strict=True):
        assert other == pytest.approx(one, rel=2e-5, abs=1e-6)
    whole, moved = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "hf").state_dict() for name in ("unbroken", "moved"))
    for name, tensor in whole.items():
        torch.testing.assert_close(moved[name], tensor, rtol=1e-3, atol=2e-5)


def test_gemmas_embeddings_are_scaled_as_transformers_rounds_the_scale():
    def check(layout, dtype):
        config = tiny_config("gemma3_text", layers=1, hidden=96)  # √96 is no bfloat16
        theirs = tiny_model(config).to(dtype)
        model = build_model(config, layout, padded_vocab_size=128, dtype=dtype)
        load_weights(model, StateDictSource(theirs))
        ids = torch.arange(2, 90)[None]
        assert torch.equal(model.word_embeddings(ids), theirs.get_input_embeddings()(ids))
        assert torch.equal(word_embeddings(model, ids[0].tolist()), theirs.get_input_embeddings()(ids)[0].float())

    for dtype in (torch.float32, torch.bfloat16):
        run_distributed(check, 1, dtype)


def test_a_gemma_that_reads_images_is_refused_and_its_text_model_taken(tmp_path):
    text = tiny_config("gemma3_text", layers=2)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Gemma3ForConditionalGeneration(Gemma3Config(text_config=text.to_dict(), vision_config=vision)).save_pretrained(tmp_path / "both")
    with pytest.raises(UserError, match=r"model_type 'gemma3' is not supported; it reads images too; save its text model with") as refused:
        ModelFolder.open(tmp_path / "both")
    command = str(refused.value).partition("transformers' ")[2].replace("FOLDER", "folder").replace("NEW", "new")
    eval(command, {"Gemma3ForCausalLM": Gemma3ForCausalLM, "AutoConfig": AutoConfig, "folder": tmp_path / "both", "new": tmp_path / "text"})
    assert ModelFolder.open(tmp_path / "text").config.model_type == "gemma3_text"
    taken, whole = (cls.from_pretrained(tmp_path / name) for cls, name in ((Gemma3ForCausalLM, "text"), (Gemma3ForConditionalGeneration, "both")))
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(taken(ids).logits, whole(ids).logits)


def test_a_sparse_models_step_is_not_captured(monkeypatch):
    """Its shapes depend on where tokens are routed."""

    def check(layout):
        model = build_model(tiny_config("qwen3_moe", layers=1), layout, padded_vocab_size=128)
        return generate(model, [[5, 6, 7], [9, 3]], [0, 1], Sampling(max_new_tokens=3, greedy=True), eos_id=-1)

    monkeypatch.setattr(rows, "is_capturable", lambda device, sampling: True)
    monkeypatch.setattr(rows, "CapturedStep", None)
    run_distributed(check, 1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"final_logit_softcapping": 30.0}, "it caps its scores or logits"),
        ({"attn_logit_softcapping": 50.0}, "it caps its scores or logits"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true: it reads what comes later"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not 'gelu_pytorch_tanh'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "proportional"}, "sliding_attention": {"rope_type": "default"}}}, "rope_type 'proportional'"),
    ],
)  # fmt: skip
def test_a_gemma_that_is_not_like_googles_says_why(fields, message):
    with pytest.raises(UserError, match=message):
        family_of(tiny_config("gemma3_text", **fields))


@pytest.mark.parametrize("fields", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}])
def test_a_sparse_model_with_dense_layers_is_refused(fields):
    with pytest.raises(UserError, match="some of its layers are dense"):
        family_of(tiny_config("qwen3_moe", **fields))
