"""LoRA equals PEFT's: losses, gradient norms and updated adapters in float64 at every layout, the exported folder, merged weights; and
nothing else is trained, kept or saved."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file
from tasks import make_rows
from test_trainer import command, numbers, run
from tiny import tiny_config, tiny_folder
from train_tokenizer import train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.checkpointing.model_folder import ModelFolder
from megakd.checkpointing.native import NativeCheckpoint
from megakd.config import LoRAConfig
from megakd.data.sft_dataset import SFTDataset
from megakd.errors import UserError
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.loading import align_vocabularies, load_model
from megakd.models.lora import ALL_LINEAR, adapt, initial_A, target_modules

LAYOUTS = {"TP1": (1, 1, False), "TP2": (2, 1, False), "PP2": (1, 2, False), "TP2 PP2 SP": (2, 2, True)}
FAMILIES = {"gpt2": ALL_LINEAR, "opt": ALL_LINEAR, "llama": ALL_LINEAR, "qwen2": ("q_proj", "v_proj", "down_proj"), "qwen3": ALL_LINEAR, "gemma3_text": ALL_LINEAR, "qwen3_moe": ("q_proj", "k_proj", "v_proj", "o_proj")}
RANK, ALPHA, ITERATIONS, LR, SEED = 4, 6.0, 3, 1e-2, 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A tiny model of each family with one tokenizer, and eight rows: a global batch is all of them."""
    root = tmp_path_factory.mktemp("lora")
    rows = make_rows(8, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in make_rows(64, seed=0)])
    for family in FAMILIES:
        tiny_folder(root / family, family, layers=2, vocab_size=len(tokenizer))
        tokenizer.save_pretrained(root / family)
    (root / "train.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"], "response": row["response"]}) + "\n" for row in rows))
    return root


def flags_of(inputs: Path, family: str, layout: str, **more) -> dict:
    tp, pp, sp = LAYOUTS[layout]
    targets = FAMILIES[family]
    return {
        "model": inputs / family, "lora-rank": RANK, "lora-alpha": ALPHA, "lora-target-modules": targets if targets == ALL_LINEAR else " ".join(targets),
        "train-iters": ITERATIONS, "lr": LR, "lr-decay-style": "constant", "clip-grad": 0, "seed": SEED, "max-length": 48, "max-prompt-length": 36, "hidden-dropout": 0, "attention-dropout": 0,
        "tensor-model-parallel-size": tp, "pipeline-model-parallel-size": pp, **({"sequence-parallel": True} if sp else {}), **more,
    }  # fmt: skip


def arguments(inputs: Path, family: str, layout: str, save: str, **more) -> list[str]:
    words = command(inputs, save, "sft", **flags_of(inputs, family, layout, **more))
    at = words.index("--valid-data")
    return [part for word in words[:at] + words[at + 2 :] for part in word.split(" ")]


def oracle(inputs: Path, family: str):
    """(losses, gradient norms, adapters by PEFT's name, merged weights), by PEFT and torch in float64."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(inputs / family, dtype=torch.float64, attn_implementation="eager")
    model.config._experts_implementation = "eager"  # the others know no float64
    targets = FAMILIES[family]
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets if targets == ALL_LINEAR else list(targets), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in adapters.items():
            if "lora_A" in name:
                module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
                parameter.copy_(initial_A(*parameter.shape, f"{SEED}/{module}"))
    optimizer = torch.optim.AdamW(adapters.values(), lr=LR, weight_decay=0.01)
    rows = SFTDataset(inputs / "train.jsonl", AutoTokenizer.from_pretrained(inputs / family), max_length=48, max_prompt_length=36)
    losses, norms = [], []
    for _ in range(ITERATIONS):
        optimizer.zero_grad()
        parts = [row_loss(model, row.prompt, row.response) for row in (rows[i] for i in range(len(rows)))]
        loss = sum(part.sum() for part in parts) / sum(len(part) for part in parts)
        loss.backward()
        losses.append(loss.item())
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in adapters.values())))
        optimizer.step()
    named = {name.replace(".default", ""): p.detach().clone() for name, p in adapters.items()}
    return losses, norms, named, model.merge_and_unload().state_dict()


def row_loss(model, prompt, response) -> torch.Tensor:
    """[tokens of the response]"""
    ids = torch.tensor([[*prompt, *response]])
    log_q = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return -log_q.gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.fixture(scope="module")
def oracles(inputs):
    return {family: oracle(inputs, family) for family in FAMILIES}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_equals_peft(inputs, oracles, family, layout):
    losses, norms, adapters, merged = oracles[family]
    tp, pp, _ = LAYOUTS[layout]
    save = f"{family}-{layout.replace(' ', '-')}"
    run_distributed(run, tp * pp, arguments(inputs, family, layout, save), tp=tp, pp=pp)
    logged = numbers(inputs / save)
    assert [row["loss/lm"] for row in logged] == pytest.approx(losses, rel=2e-6)
    assert [row["grad_norm"] for row in logged] == pytest.approx(norms, rel=2e-5)
    folder = inputs / save / "hf"
    written = adapter_of(folder)
    assert set(written) == set(adapters)
    for name, exact in adapters.items():
        torch.testing.assert_close(written[name].double(), exact, rtol=1e-4, atol=2e-6)
    source = ModelFolder.open(folder).source
    for name in ("q_proj", "c_attn", "down_proj", "fc2"):
        for key in (key for key in merged if key.endswith(f"{name}.weight") and key in source):
            whole = tuple(slice(0, size) for size in source.shape(key))
            torch.testing.assert_close(source.read(key, whole).double(), merged[key], rtol=1e-4, atol=2e-6)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """By PEFT's names."""
    return load_file(folder / "adapter_model.safetensors")


def test_peft_loads_the_folder_and_says_the_same(inputs):
    peft = pytest.importorskip("peft")
    run_distributed(run, 1, arguments(inputs, "llama", "TP1", "loaded"))
    base = AutoModelForCausalLM.from_pretrained(inputs / "llama")
    ids = torch.arange(2, 14)[None]
    with torch.no_grad():
        untouched = base(ids).logits.clone()
        adapted = peft.PeftModel.from_pretrained(base, inputs / "loaded" / "hf")(ids).logits
    run_distributed(run, 1, arguments(inputs, "llama", "TP1", "loaded", **{"merge-lora": True}))  # of the run that is finished
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(inputs / "loaded" / "hf")(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - untouched).abs().max() > 1e-2


def test_a_checkpoint_holds_adapters_alone_and_continues_to_the_bit(inputs):
    whole = arguments(inputs, "gpt2", "TP2", "unbroken", **{"lora-dropout": 0.2, "save-interval": 2})
    run_distributed(run, 2, whole, tp=2)
    broken = arguments(inputs, "gpt2", "TP2", "broken", **{"lora-dropout": 0.2, "save-interval": 2})
    run_distributed(run, 2, broken, 3, tp=2)
    run_distributed(run, 2, broken, tp=2)
    assert numbers(inputs / "broken") == numbers(inputs / "unbroken")
    native = NativeCheckpoint(inputs / "unbroken" / "checkpoints")
    assert all(".adapters." in key for key in native.keys)
    count = lambda start: sum(math.prod(native.shape(key)) for key in native.keys if key.startswith(start))
    adapters = 2 * RANK * (64 + 192 + 64 + 64 + 64 + 256 + 256 + 64)  # layers, and what A and B of c_attn, c_proj, c_fc, c_proj read and write
    assert [count(start) for start in ("decoder.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")] == [adapters] * 3
    a, b = (adapter_of(inputs / name / "hf") for name in ("broken", "unbroken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match="holds adapters, not a model; give the run's export"):
        ModelFolder.open(inputs / "unbroken" / "checkpoints")


def test_dropout_is_on_what_an_adapter_reads_and_the_same_on_ranks_that_read_the_same(inputs):
    runs = {"dry": ("TP1", 0.0), "wet": ("TP1", 0.5), "wet-on-two": ("TP2", 0.5)}
    for name, (layout, dropout) in runs.items():  # c_attn alone, which is cut by its rows
        words = arguments(inputs, "gpt2", layout, name, **{"lora-dropout": dropout, "lora-target-modules": "c_attn"})
        run_distributed(run, LAYOUTS[layout][0], words)
    dry, wet, cut = (numbers(inputs / name) for name in runs)
    assert abs(dry[-1]["loss/lm"] - wet[-1]["loss/lm"]) > 1e-4
    for one, other in zip(wet, cut, strict=True):
        assert other == pytest.approx(one, rel=2e-4, abs=2e-6)


def test_a_student_with_adapters_writes_and_learns_the_same_at_every_layout(inputs):
    """PromptKD: its responses come from the adapted student, or the second iteration's would be the first's."""
    more = {"teacher-model": inputs / "llama", "valid-data": inputs / "train.jsonl", "max-new-tokens": 8, "train-iters": ITERATIONS}
    runs = {
        "alone": (1, "TP1", {}),
        "cut": (4, "TP2", {"use-distributed-optimizer": True, "micro-batch-size": 4}),
        "recomputed": (4, "TP2 PP2 SP", {"recompute": True}),
    }
    for name, (ranks, layout, flags) in runs.items():
        words = command(inputs, f"promptkd-{name}", "promptkd", **flags_of(inputs, "llama", layout, **more, **flags))
        run_distributed(run, ranks, words)
    alone, *others = (numbers(inputs / f"promptkd-{name}") for name in runs)
    assert len({row["loss/reverse_kl"] for row in alone if "loss/reverse_kl" in row}) == ITERATIONS
    for other in others:
        for one, row in zip(alone, other, strict=True):
            assert row == pytest.approx(one, rel=2e-4, abs=2e-6)


def test_the_adapted_model_writes_what_the_merged_one_writes(inputs):
    def tokens(layout, folder, adapted):
        """Greedy responses of a model whose adapters are drawn, in its layers or in its weights."""
        model = load_model(ModelFolder.open(folder), layout, **align_vocabularies([ModelFolder.open(folder).config.vocab_size], layout.tp_size))
        if adapted:
            adapt(model, LoRAConfig(lora_rank=RANK, lora_alpha=ALPHA, lora_target_modules=(ALL_LINEAR,)), seed=SEED)
            source = adapter_of(inputs / "llama-TP1" / "hf")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".adapters." in name:
                        parameter.copy_(placed(source, name))
        return generate(model, [[5, 6, 7], [9, 3]], [0, 1], Sampling(max_new_tokens=12, greedy=True), eos_id=-1)

    def placed(source, name):
        part, module, number = name[-1], name.split(".")[-2], name.split(".")[2]
        return next(tensor for key, tensor in source.items() if f".layers.{number}." in key and f".{module}.lora_{part}" in key)

    if not (inputs / "llama-TP1" / "hf").is_dir():
        run_distributed(run, 1, arguments(inputs, "llama", "TP1", "llama-TP1"))
    ((with_adapters,), (merged,), (base,)) = (
        run_distributed(tokens, 1, folder, adapted)
        for folder, adapted in ((inputs / "llama", True), (inputs / "llama-TP1" / "hf", False), (inputs / "llama", False))
    )
    assert with_adapters == merged != base


def test_an_adapter_on_an_adapter_is_refused_before_a_weight_is_loaded(inputs):
    if not (inputs / "llama-TP1" / "hf").is_dir():
        run_distributed(run, 1, arguments(inputs, "llama", "TP1", "llama-TP1"))
    words = arguments(inputs, "llama", "TP1", "twice")
    words[words.index("--model") + 1] = str(inputs / "llama-TP1" / "hf")
    with pytest.raises(AssertionError, match=r"--lora-rank 4: --model .*hf is an adapter itself; give a whole model, --merge-lora exports one"):
        run_distributed(run, 1, words)
    assert not (inputs / "twice").exists()


def test_targets_are_pefts_and_a_wrong_one_names_those_that_are(inputs):
    config = ModelFolder.open(inputs / "gpt2").config
    assert target_modules(config, ()) == {"transformer.h.*.attn.c_attn"}
    assert target_modules(config, ("c_proj",)) == {"transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj"}
    with pytest.raises(UserError, match=r"--lora-target-modules q_proj: .* use some of c_attn, c_fc, c_proj, or all-linear"):
        target_modules(config, ("q_proj",))


@pytest.mark.parametrize("family, fields, part", [("opt", {"word_embed_proj_dim": 32}, "project_in"), ("qwen3_moe", {}, "experts")])
def test_all_linear_is_refused_where_it_would_be_less_than_pefts(family, fields, part):
    with pytest.raises(UserError, match=rf"--lora-target-modules all-linear: {part} of this {family} model has no adapters here; use some of .*q_proj"):
        target_modules(tiny_config(family, **fields), (ALL_LINEAR,))


def test_a_flag_of_adapters_without_adapters_is_refused():
    assert list(LoRAConfig(lora_alpha=3).validation_errors()) == ["--lora-alpha is read by adapters only; give --lora-rank too, or leave it out"]
    assert not list(LoRAConfig(lora_alpha=3, peft="lora").validation_errors()) and LoRAConfig(peft="lora").rank == 8
