"""--rollout-engine vllm, with a stand-in for vLLM (stand_ins/vllm.py): what it is handed, what it is asked, and what comes of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed import run_distributed
from safetensors.torch import load_file
from test_generation import EOS, GREEDY, IDS, SAMPLED, VARIANTS, load, p_value, prompts
from test_trainer import command, inputs, numbers, run  # noqa: F401 - a fixture
from tiny import tiny_folder
from transformers import AutoModelForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megakd import preflight
from megakd.checkpointing.live_tensors import live_tensors, skipped_rows
from megakd.checkpointing.model_folder import ModelFolder
from megakd.config import Config, DataConfig, LoRAConfig
from megakd.data.batch import Sample
from megakd.data.end_ids import EndIds
from megakd.errors import UserError
from megakd.generation import vllm_engine
from megakd.generation.generate import generate
from megakd.generation.sampling import Sampling
from megakd.generation.vllm_engine import VllmEngine
from megakd.methods.agreement import LARGEST, MEAN
from megakd.methods.rollout import rollout
from megakd.models.lora import ALL_LINEAR, Adapter, ColumnAdapter, adapt
from megakd.reporting.jsonl import read_jsonl

STAND_INS = Path(__file__).parent / "stand_ins"
FAMILIES = ("gpt2", "opt", "opt-350m", "llama, one key/value head", "qwen3-moe", "gemma3")
WRITERS = ("gpt2", "llama, one key/value head")
CONFIG = Config(method="promptkd", data=DataConfig(max_length=40, max_prompt_length=24))
ENDS = (EOS, 41)
NONE = [0] * len(IDS)  # generations


@pytest.fixture(scope="module", autouse=True)
def stand_in():
    """In vLLM's place for whoever imports it: the forked ranks, this process never."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(STAND_INS)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_folder(root / name.replace("/", "-"), **VARIANTS[name]) for name in FAMILIES}


def tokens(written) -> list[list[int]]:
    return [response.tokens for response in written]


def engine_of(model, folder: Path, *, sleeps: bool = False, **data) -> VllmEngine:
    return VllmEngine(model, ModelFolder.open(folder), replace(CONFIG, data=replace(CONFIG.data, **data)), sleeps=sleeps)


def is_handed_over(model, folder: Path) -> list[str]:
    """Names, in order; every tensor is the folder's to the bit."""
    stored, source = load_file(folder / "model.safetensors"), ModelFolder.open(folder).source
    found = [(name, tensor.clone()) for name, tensor in live_tensors(model, skipped_rows(model, source))]
    assert {name for name, _ in found} == set(stored) and len(found) == len(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in found)
    return [name for name, _ in found]


def answers(layout, folders):
    """What is handed over of every family, and responses of some: both engines', each replica its share."""
    found = {name: {"names": is_handed_over(load(layout, folder), folder)} for name, folder in folders.items()}
    mine = range(layout.dp_rank, len(IDS), layout.dp_size)
    asked, ids = [prompts()[i] for i in mine], [IDS[i] for i in mine]
    for name in WRITERS:
        model = load(layout, folders[name], sequence_parallel=True, hidden_dropout=0.3, attention_dropout=0.3).train()
        engine = engine_of(model, folders[name], sleeps=name == "gpt2")
        ask = partial(engine.generate, asked, ids, eos_id=ENDS, generations=[0] * len(ids))
        found[name] |= {"greedy": tokens(ask(GREEDY)), "sampled": tokens(ask(SAMPLED))}
        assert (engine.llm.tensor_parallel_size, engine.llm.dtype, engine.llm.max_num_seqs) == (layout.tp_size, "float32", 64)
        found[name] |= {"its own": generate(model, asked, ids, GREEDY, eos_id=ENDS), "first": tokens(engine.generate(asked[:1], ids[:1], SAMPLED, eos_id=ENDS, generations=[0]))}
        assert model.training
    return found


@pytest.fixture(scope="module")
def alone(folders):
    return run_distributed(answers, 1, folders)[0]


def test_greedy_responses_are_those_of_our_decoder_and_draws_are_each_rows_own(alone):
    for name in WRITERS:
        found = alone[name]
        assert found["greedy"] == found["its own"] and len(set(map(tuple, found["greedy"]))) > 1
        assert found["sampled"] != found["greedy"] and found["sampled"][:1] == found["first"]
        assert {len(response) for response in found["sampled"]} != {SAMPLED.max_new_tokens}, "some end"


@pytest.mark.parametrize("ranks, sizes", [(2, {"tp": 2}), (2, {"pp": 2}), (2, {})], ids=["TP2", "PP2", "DP2"])
def test_weights_and_responses_are_the_same_on_every_layout(folders, alone, ranks, sizes):
    found = run_distributed(answers, ranks, folders, **sizes)
    replicas = found if not sizes else found[:1]
    assert all(one == found[0] for one in found) or not sizes
    for name in FAMILIES:
        assert found[0][name]["names"] == alone[name]["names"]
    for name in WRITERS:
        for kind in ("greedy", "its own", "sampled"):
            together = [None] * len(IDS)
            for replica, one in enumerate(replicas):
                together[replica :: len(replicas)] = one[name][kind]
            assert together == alone[name][kind], (name, kind)


def test_a_layers_tensors_come_together(alone):
    """vLLM's advice: what is loaded out of order is kept beside the model until its layer is whole."""
    for found in alone.values():
        layers = [int(number) for name in found["names"] if (number := "".join(re.findall(r"\.(?:h|layers)\.(\d+)\.", name)))]
        assert layers == sorted(layers) and len(set(layers)) > 1


def drawn(layout, folder):
    """First tokens by the seeds of many samples, and of two answers to one."""
    model = load(layout, folder)
    engine, many = engine_of(model, folder), 2000
    cut = Sampling(max_new_tokens=1, temperature=0.7, top_k=30, top_p=0.9, seed=3)
    first = tokens(engine.generate([prompts()[0]] * many, range(many), cut, eos_id=ENDS, generations=[0] * many))
    twice = tokens(engine.generate([prompts()[0]] * 2, [7, 7], replace(SAMPLED, temperature=2.0), eos_id=ENDS, generations=[0, 1]))
    other = tokens(engine.generate([prompts()[0]], [7], replace(SAMPLED, temperature=2.0, seed=6), eos_id=ENDS, generations=[0]))
    short = engine_of(model, folder, max_length=20)
    short.llm.config.eos_token_id = generate(model, prompts()[:1], IDS[:1], GREEDY, eos_id=())[0][1]  # an end of the folder's, and not of the run's
    return first, twice, other, tokens(short.generate(prompts(), IDS, GREEDY, eos_id=(), generations=NONE))


def test_draws_follow_temperature_top_k_and_top_p_and_lengths_are_bounded(folders):
    ((first, (one, other_answer), (other_seed,), short),) = run_distributed(drawn, 1, folders["gpt2"])
    model = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    with torch.no_grad():
        z = model(torch.tensor([prompts()[0]])).logits[:, -1]
    for warp in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(30), TopPLogitsWarper(0.9)):
        z = warp(None, z)
    counts = torch.zeros(z.shape[1])
    for token, count in Counter(response[0] for response in first).items():
        counts[token] = count
    assert p_value([(counts, len(first) * z[0].softmax(-1))]) > 1e-3
    assert one != other_answer and one != other_seed
    assert [len(response) for response in short] == [min(GREEDY.max_new_tokens, 20 - len(prompt)) for prompt in prompts()]


def narrowed(layout, folder):
    """Of a model of whose ids the first 80 count, as beside a teacher with fewer."""
    model = load(layout, folder, real_vocab_size=80)
    few = [[token % 80 for token in prompt] for prompt in prompts()]
    ours = generate(model, few, IDS, SAMPLED, eos_id=EOS)
    theirs = tokens(engine_of(model, folder).generate(few, IDS, replace(SAMPLED, temperature=2.0), eos_id=(EOS,), generations=NONE))
    assert max(max(response) for response in ours + theirs) < 80
    hungry = replace(CONFIG, generation=replace(CONFIG.generation, vllm_gpu_memory_utilization=0.99))
    with pytest.raises(UserError, match=r"--rollout-engine vllm does not start: Free memory .*; if memory lacks, another --vllm-gpu-memory-utilization than 0.99"):
        VllmEngine(model, ModelFolder.open(folder), hungry, sleeps=False)
    with torch.no_grad():
        next(model.parameters())[5] = torch.nan
    with pytest.raises(UserError, match="--rollout-engine vllm: the response to sample 31 has tokens whose logits are NaN"):
        engine_of(model, folder).generate([[5, 6]], IDS[:1], SAMPLED, eos_id=(EOS,), generations=[0])


def test_ids_that_do_not_count_are_never_drawn_and_what_does_not_go_is_told(folders):
    run_distributed(narrowed, 1, folders["gpt2"])


def differences(layout, folder):
    """Of a rollout with the weights that the student has, and of one before with one of them wrong."""
    model = load(layout, folder)
    engine = VllmEngine.beside(model, ModelFolder.open(folder), CONFIG)
    samples = [Sample(i, tuple(prompt), ()) for i, prompt in enumerate(prompts())][layout.dp_rank :: layout.dp_size]
    config = replace(CONFIG, generation=replace(CONFIG.generation, max_new_tokens=9, temperature=1.5, top_k=20))
    write = partial(rollout, model, samples, config, EndIds((EOS,), EOS), 1)
    with pytest.MonkeyPatch.context() as patch:
        spoilt = lambda *given: ((name, tensor + 0.1 if name.endswith("ln_f.bias") else tensor) for name, tensor in live_tensors(*given))
        patch.setattr(vllm_engine, "live_tensors", spoilt)
        write()
    wrong = engine.take_differences()
    write()  # of the same prompts, of which nothing may be left
    told = engine.take_differences()
    assert engine.take_differences() == {}
    return told, wrong


@pytest.mark.parametrize("ranks, sizes", [(1, {}), (2, {"tp": 2}), (2, {"pp": 2}), (2, {})], ids=["one rank", "TP2", "PP2", "DP2"])
def test_log_probabilities_agree_unless_a_weight_is_wrong(folders, ranks, sizes):
    found = run_distributed(differences, ranks, folders["gpt2"], **sizes)
    assert all(one == found[0] for one in found), "all ranks know the numbers"
    right, wrong = found[0]
    assert set(right) == {MEAN, LARGEST}
    assert 0 < right[MEAN] < 1e-5 and right[MEAN] < right[LARGEST] < 1e-4
    assert wrong[MEAN] > 1e-2 and wrong[LARGEST] > 2 * wrong[MEAN]


def adapted(layout, folder):
    """Responses of a model with adapters that have learnt, by both."""
    model = load(layout, folder)
    adapt(model, LoRAConfig(lora_rank=4, lora_target_modules=(ALL_LINEAR,)), seed=5)
    for adapter in (module for module in model.modules() if isinstance(module, Adapter)):
        noise = torch.Generator().manual_seed(layout.tp_rank if isinstance(adapter, ColumnAdapter) else 7)  # whose B is cut, or whole
        adapter.B.data.normal_(0, 0.5, generator=noise)
    plain = generate(load(layout, folder), prompts(), IDS, GREEDY, eos_id=EOS)
    engine = engine_of(model, folder)
    written = engine.generate(prompts(), IDS, GREEDY, eos_id=(EOS,), generations=NONE)
    assert tokens(written) == generate(model, prompts(), IDS, GREEDY, eos_id=EOS) != plain


@pytest.mark.parametrize("tp", [1, 2])
def test_adapters_are_handed_over_in_the_weights(tmp_path, tp):
    run_distributed(adapted, tp, tiny_folder(tmp_path / "llama", "llama", layers=2), tp=tp)


RUNS = {  # ranks and flags of runs with either engine: a soft prompt and answers to a prompt twice, adapters; both with dropout's masks
    "promptkd": (2, {"num-generations": 2, "top-k": 1, "save-rollouts": True}),
    "kd": (2, {"on-policy-ratio": 1, "lora-rank": 4, "lora-target-modules": "all-linear", "tp": 2, "top-k": 1, "save-rollouts": True}),
}


def arguments(inputs: Path, save: str, method: str, **flags) -> list[str]:  # noqa: F811
    """Of a run of two iterations without evaluations."""
    more = {"train-iters": 2, "save-interval": 2, "max-new-tokens": 6, "lr": 0.02, "micro-batch-size": 4}
    words = command(inputs, save, method, **more | flags)
    for left_out in ("--valid-data", "--eval-interval"):
        at = words.index(left_out)
        del words[at : at + 2]
    return words


@pytest.mark.parametrize("method", RUNS)
def test_a_run_is_the_one_with_our_decoder_where_one_token_is_left_to_choose(inputs, method):  # noqa: F811
    ranks, flags = RUNS[method]
    runs = {engine: arguments(inputs, f"{method}-{engine}", method, **flags, **{"rollout-engine": engine}) for engine in ("megakd", "vllm")}
    for words in runs.values():
        run_distributed(run, ranks, words)
    ours, theirs = (inputs / f"{method}-{engine}" for engine in runs)
    rollouts = [[(row["iteration"], row["sample_id"], row["response"]) for row in read_jsonl(folder / "rollouts.jsonl")] for folder in (ours, theirs)]
    assert rollouts[0] == rollouts[1]
    assert numbers(theirs) == numbers(ours)
    told = [row for row in read_jsonl(theirs / "metrics.jsonl") if MEAN in row]
    assert [row["iteration"] for row in told] == [1, 2] and all(row[MEAN] < 1e-5 and row[LARGEST] < 1e-4 for row in told)
    assert not any(MEAN in row for row in read_jsonl(ours / "metrics.jsonl"))


def test_a_run_that_samples_continues_exactly(inputs):  # noqa: F811
    flags = {"temperature": 1.2, "save-interval": 1, "train-iters": 2, "rollout-engine": "vllm", "on-policy-ratio": 1}
    for save, cut_off in (("whole", None), ("broken", 2), ("broken", None)):
        run_distributed(run, 1, arguments(inputs, save, "kd", **flags), cut_off)
    assert numbers(inputs / "whole") == numbers(inputs / "broken")


# ---- what vLLM is relied on to know

RELIED_ON = {
    "LLM": {
        "model", "hf_overrides", "skip_tokenizer_init", "generation_config", "load_format", "dtype", "tensor_parallel_size",
        "distributed_executor_backend", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "enable_sleep_mode", "logprobs_mode",
    },
    "SamplingParams": {"temperature", "top_k", "top_p", "stop_token_ids", "ignore_eos", "logprobs", "detokenize", "seed", "max_tokens"},
    "LLM.generate": {"prompts", "sampling_params", "use_tqdm"},
    "LLM.collective_rpc": {"method", "kwargs"},
    "LLM.reset_prefix_cache": set(),
    "LLM.sleep": {"level"},
    "LLM.wake_up": {"tags"},
    "reload_weights": {"weights_iterator"},
    "CompletionOutput": {"token_ids", "logprobs", "finish_reason"},
}  # fmt: skip


def known(*_) -> dict[str, list[str]]:
    """What the vllm that is imported here knows: names of arguments and of fields."""
    import vllm

    names = lambda function: list(inspect.signature(function).parameters)
    if hasattr(vllm, "CompletionOutput") and not importlib.util.find_spec("vllm").submodule_search_locations:
        engine, reload_weights = [], vllm.LLM._reload_weights  # the stand-in
    else:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        engine, reload_weights = [line.name for line in dataclasses.fields(EngineArgs)], GPUModelRunner.reload_weights
    found = {"LLM": names(vllm.LLM) + engine, "SamplingParams": names(vllm.SamplingParams), "reload_weights": names(reload_weights)}
    found |= {f"LLM.{name}": names(getattr(vllm.LLM, name)) for name in ("generate", "collective_rpc", "reset_prefix_cache", "sleep", "wake_up")}
    return found | {"CompletionOutput": names(importlib.import_module("vllm.outputs" if engine else "vllm").CompletionOutput)}


def check_known(found: dict[str, list[str]]) -> None:
    for what, names in RELIED_ON.items():
        assert names <= set(found[what]), f"{what} lacks {names - set(found[what])}"


def test_the_stand_in_knows_the_names_that_are_relied_on():
    check_known(*run_distributed(known, 1))


def test_vllm_knows_the_names_that_are_relied_on():
    """The real one, where it is installed; imported in a process of its own, which has no stand-in."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        pytest.skip("vllm is not installed")
    code = "import json, test_vllm_rollouts as here; print(json.dumps(here.known()))"
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | path, check=True)
    check_known(json.loads(asked.stdout.splitlines()[-1]))


def test_no_other_names_are_used():
    source = inspect.getsource(vllm_engine)
    asked = re.search(r"return LLM\((.*?)\n        \)", source, re.S).group(1)
    assert set(re.findall(r"^            (\w+)=", asked, re.M)) == RELIED_ON["LLM"]
    given = re.search(r"shared = \{(.*?)\n        \}", source, re.S).group(1)
    assert set(re.findall(r'^            "(\w+)":', given, re.M)) | {"seed"} == RELIED_ON["SamplingParams"]


def test_a_folder_of_quantised_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_engine, "check_installed", lambda: None)
    student = SimpleNamespace(path=tmp_path, config=SimpleNamespace(quantization_config={"quant_method": "fp8"}))
    vllm = replace(CONFIG, generation=replace(CONFIG.generation, rollout_engine="vllm"))
    with pytest.raises(UserError, match=r"--rollout-engine vllm: the config.json of --model .* asks for quantised weights.*give the folder of a plain"):
        preflight.check_rollout_engine(vllm, student)
    preflight.check_rollout_engine(CONFIG, student)
    preflight.check_rollout_engine(replace(vllm, method="kd"), student)  # of whose batches the student writes none


def test_vllm_that_is_absent_or_old_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'--rollout-engine vllm: vllm is not installed; pip install "megakd\[vllm\]", or leave it out'):
        vllm_engine.check_installed()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for version, fits in {"0.9.2": False, "0.33.0": True, "1.0.0rc1": True}.items():
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        if fits:
            vllm_engine.check_installed()
        else:
            with pytest.raises(UserError, match=r"vllm 0.9.2 is installed, and 0.33 or later is needed; update it"):
                vllm_engine.check_installed()
