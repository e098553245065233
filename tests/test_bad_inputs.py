"""Mistakes end in one clear line that names the flag or file and the way out, before a weight is loaded, and leave nothing behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from distributed import run_distributed
from safetensors.torch import load_file, save_file
from tasks import make_rows
from tiny import tiny_folder
from train_tokenizer import train_tokenizer

from megakd import begun_with, errors, loading, trainer
from megakd.checkpointing import native
from megakd.checkpointing.fingerprint import checksum
from megakd.config import parse
from megakd.data import bounded, templates
from megakd.errors import UserError
from megakd.models.hf_config import load_hf_config
from megakd.runtime.initialize import process_group_closed_at_exit


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Good models and data, and one broken copy for every way to break them."""
    root = tmp_path_factory.mktemp("inputs")
    rows = make_rows(64, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    for name in ("student", "teacher"):
        tiny_folder(root / name, "gpt2", layers=2, vocab_size=len(tokenizer))
        tokenizer.save_pretrained(root / name)
    write_jsonl(root / "good.jsonl", [{"prompt": row["prompt"], "response": row["response"]} for row in rows])
    break_models(root)
    break_data(root)
    break_more_models(root)
    return root


def break_models(root: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(root / "student", root / name))

    (copy("no-config") / "config.json").unlink()
    change_json(copy("other-family") / "config.json", model_type="bert")
    change_json(copy("remote-code") / "config.json", model_type="other", auto_map={"AutoConfig": "code.Config"})
    (root / "remote-code" / "code.py").write_text("raise SystemExit('code of the folder ran')\n")
    change_json(copy("not-json") / "config.json", text="{")
    weights = copy("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (copy("no-weights") / "model.safetensors").unlink()
    sharded = copy("missing-shard")
    (sharded / "model.safetensors").unlink()
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    lacking = copy("missing-tensor") / "model.safetensors"
    tensors = load_file(lacking)
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, lacking, metadata={"format": "pt"})
    (copy("no-tokenizer") / "tokenizer.json").unlink()
    other = train_tokenizer(["completely different words"] * 4)
    other.save_pretrained(copy("other-tokenizer"))
    change_json(copy("few-rows") / "config.json", vocab_size=50)
    few = load_file(root / "few-rows" / "model.safetensors")
    few["transformer.wte.weight"] = few["transformer.wte.weight"][:50].clone()
    save_file(few, root / "few-rows" / "model.safetensors", metadata={"format": "pt"})


def break_more_models(root: Path) -> None:
    """Huge and hostile ones, and those that name what is elsewhere."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(root / "student", root / name))

    elsewhere = copy("index-outside")
    (elsewhere / "model.safetensors").unlink()
    (elsewhere / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../student/model.safetensors"}}))
    (copy("link-outside") / "model.safetensors").unlink()
    (root / "link-outside" / "model.safetensors").symlink_to(root / "student" / "model.safetensors")
    (copy("template-outside") / "chat_template.jinja").symlink_to(root / "good.jsonl")
    sparse(copy("large-header") / "model.safetensors", 6 * 2**30, begin=(6 * 2**30 - 8).to_bytes(8, "little"))
    sparse(copy("large-config") / "config.json", 2**30)
    change_json(copy("deep-config") / "config.json", text="[" * 100_000)
    change_json(copy("text-layers") / "config.json", n_layer="two")
    change_json(copy("many-layers") / "config.json", n_layer=10**6)
    (copy("lfs") / "model.safetensors").write_bytes(errors.LFS_POINTER + b".github.com/spec/v1\n")
    change_json(copy("bad-tokenizer") / "tokenizer.json", text="{}")
    change_json(copy("no-end") / "generation_config.json", eos_token_id="the end")
    for name, fields in {"lone-adapter": {"base_model_name_or_path": "nowhere"}, "no-rank": {"base_model_name_or_path": "student", "r": 0}}.items():
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
        save_file({"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(1, 1)}, root / name / "adapter_model.safetensors")


def sparse(file: Path, size: int, *, begin: bytes = b"") -> None:
    with file.open("wb") as stream:
        stream.write(begin)
        stream.truncate(size)


def break_data(root: Path) -> None:
    sparse(root / "zeros.jsonl", 12 * 2**30)
    write_jsonl(root / "huge-prompt.jsonl", [{"prompt": "x" * (4 * 2**20 + 1), "response": "b"}])
    (root / "deep.jsonl").write_text('{"a":' * 100_000)
    (root / "twice.csv").write_text("prompt,prompt\na,b\n")
    (root / "latin.jsonl").write_bytes('{"prompt": "é", "response": "b"}\n'.encode("latin-1"))
    write_jsonl(root / "chats.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    (root / "bomb.yaml").write_text("lr: &a [1, 1]\nmin-lr: [*a, *a]\n")
    (root / "python.yaml").write_text("lr: !!python/name:os.system\n")
    (root / "loop.jinja").write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    (root / "field.jinja").write_text("{{ question }}")
    (root / "empty.jsonl").write_text("")
    (root / "not-json.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    write_jsonl(root / "wrong-type.jsonl", [{"prompt": "a", "response": 7}])
    write_jsonl(root / "no-response.jsonl", [{"prompt": "a"}])
    write_jsonl(root / "long-prompts.jsonl", [{"prompt": "Copy: a b c d\nAnswer:" * 20, "response": " b"}])
    write_jsonl(root / "text.jsonl", [{"text": "a text of a few words"}] * 8)
    (root / "unknown-key.yaml").write_text("lr: 1e-3\nlearning_speed: 3\n")
    (root / "not.yaml").write_text("lr: [1\n")


def write_jsonl(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def change_json(path: Path, text: str | None = None, **fields) -> None:
    path.write_text(text or json.dumps(json.loads(path.read_text()) | fields))


GOOD = {
    "method": "kd", "model": "{root}/student", "teacher-model": "{root}/teacher", "train-data": "{root}/good.jsonl", "max-length": "32",
    "max-prompt-length": "16", "train-iters": "1", "micro-batch-size": "2", "global-batch-size": "4", "save": "{root}/run",
}  # fmt: skip

CASES = {  # what is wrong: flags over the good ones (None takes one away), what the line must say, ranks
    "no student named": ({"model": None}, r"--model is missing; give"),
    "no teacher named": ({"teacher-model": None}, r"--method kd needs --teacher-model; give"),
    "a teacher that nobody reads": ({"method": "sft"}, r"--method sft has no use for --teacher-model .*leave it out"),
    "a flag of one other method": ({"num-rollouts": "64"}, r"--method kd has no use for --num-rollouts 64, a flag of minillm; leave it out"),
    "a flag of several other methods": ({"method": "promptkd", "kd-temperature": "2"}, r"--method promptkd has no use for --kd-temperature 2.0, a flag of kd, seqkd, distillm; leave"),
    "a switch of another method": ({"no-length-norm": "True"}, r"--method kd has no use for --no-length-norm, a flag of minillm; leave it out"),
    "no length of the run": ({"train-iters": None}, r"--train-iters None and --epochs None: give exactly one"),
    "two lengths of the run": ({"epochs": "2"}, r"--train-iters 1 and --epochs 2: give exactly one"),
    "no folder for the run": ({"save": None}, r"--save is missing; name"),
    "an unknown flag": ({"learning-speed": "3"}, r"Unrecognized options: --learning-speed.*--help lists the flags"),
    "a flag of the wrong type": ({"lr": "fast"}, r"--lr: could not convert string to float: 'fast'"),
    "a number out of range": ({"top-p": "1.5"}, r"--top-p 1.5 must be above 0 and at most 1"),
    "sequence parallelism alone": ({"sequence-parallel": "True"}, r"--sequence-parallel needs --tensor-model-parallel-size"),
    "a missing YAML file": ({"config": "{root}/nowhere.yaml"}, r"--config .*nowhere.yaml: no such file"),
    "an unknown YAML key": ({"config": "{root}/unknown-key.yaml"}, r"unknown-key.yaml: unknown key 'learning_speed'; --help lists"),
    "a broken YAML file": ({"config": "{root}/not.yaml"}, r"not.yaml: not YAML .*write one `flag-name: value` a line"),
    "no such model": ({"model": "{root}/nowhere"}, r"--model .*nowhere: no such folder; give"),
    "no config.json": ({"model": "{root}/no-config"}, r"--model .*no-config: no config.json; give"),
    "a broken config.json": ({"teacher-model": "{root}/not-json"}, r"--teacher-model .*not-json/config.json: not JSON \(.* at line 1 column 2\); copy or download it again"),
    "an unknown family": ({"model": "{root}/other-family"}, r"--model .*: model_type 'bert' is not supported; use one of gemma3_text, gpt2, llama"),
    "truncated weights": ({"teacher-model": "{root}/truncated"}, r"model.safetensors: [\d,]+ bytes, truncated or damaged \(.*\); copy or download"),
    "pickled weights": ({"model": "{root}/pickled"}, r"pytorch_model.bin: PyTorch's format of before version 1.6, or damaged; .*give the folder that save_pretrained writes"),
    "no weights": ({"model": "{root}/no-weights"}, r"no model.safetensors and no model.safetensors.index.json; the weights are missing"),
    "a missing shard": ({"model": "{root}/missing-shard"}, r"model-00001-of-00002.safetensors: the index names this file, but it is not there"),
    "a missing tensor": ({"model": "{root}/missing-tensor"}, r"tensor 'transformer.h.1.mlp.c_fc.weight' is missing"),
    "no tokenizer": ({"model": "{root}/no-tokenizer"}, r"no-tokenizer holds none of .*; copy the model's tokenizer files"),
    "unequal tokenizers": ({"teacher-model": "{root}/other-tokenizer"}, r"different tokenizers: id \d+ is .* for the teacher and .*; distil between"),
    "a tokenizer larger than the embedding": ({"model": "{root}/few-rows"}, r"--model .*few-rows: the tokenizer has ids up to \d+, but the model only 50"),
    "ranks that no layout fits": ({"tp": "2"}, r"--tensor-model-parallel-size 2 × --pipeline-model-parallel-size 1 = 2 does not divide the 1 rank"),
    "TP that does not divide the heads": ({"tp": "3"}, r"--tensor-model-parallel-size 3 does not divide the 4 attention heads.*use one of \[1, 2, 4\]", 3),
    "no rank left for the student": ({"teacher-ranks": "2"}, r"--teacher-ranks 2 leaves the student none of the 2 rank\(s\) started; use torchrun --nproc_per_node with 3 or more", 2),
    "a student that what is left does not fit": ({"teacher-ranks": "1", "tp": "2"}, r"--tensor-model-parallel-size 2 × .* does not divide the 1 rank\(s\) that --teacher-ranks 1 leaves of 2; start 1 and a multiple of 2", 2),
    "teacher's ranks that its layout does not fit": ({"teacher-ranks": "1", "teacher-tp": "2"}, r"--teacher-tensor-model-parallel-size 2 × .* does not divide the 1 of --teacher-ranks 1; use a multiple of 2", 2),
    "a teacher's TP that does not divide its heads": ({"teacher-tp": "3"}, r"--teacher-tensor-model-parallel-size 3 does not divide the 4 attention heads.* of --teacher-model .*use one of", 3),
    "a mixture of models in two layouts": ({"method": "minillm", "num-rollouts": "4", "teacher-pp": "2"}, r"--teacher-mixed-alpha 0.2 draws each token from both .*give --teacher-mixed-alpha 0, or leave out --teacher-pipeline-model-parallel-size 2"),
    "a vLLM that is not there": ({"on-policy-ratio": "1", "rollout-engine": "vllm"}, r'--rollout-engine vllm: vllm is not installed; pip install "megakd\[vllm\]", or leave it out'),
    "vLLM for what the teacher writes": ({"method": "seqkd", "rollout-engine": "vllm"}, r"--method seqkd has no use for --rollout-engine vllm, a flag of kd, distillm, minillm, promptkd; leave it out"),
    "a mixture for vLLM": ({"method": "minillm", "num-rollouts": "4", "rollout-engine": "vllm"}, r"--rollout-engine vllm draws from one model, and --teacher-mixed-alpha 0.2 from both; give --teacher-mixed-alpha 0, or leave"),
    "vLLM beside ranks of the teacher's own": ({"method": "promptkd", "teacher-ranks": "1", "rollout-engine": "vllm"}, r"--rollout-engine vllm forms groups of all ranks, and the teacher's .--teacher-ranks 1. take no part; leave one of them out", 2),
    "vLLM where the bits are to be the same": ({"method": "promptkd", "deterministic-mode": "True", "rollout-engine": "vllm"}, r"--rollout-engine vllm: vLLM's sums depend on what else is in its batch, and --deterministic-mode bars that; leave one"),
    "a temperature that vLLM refuses": ({"method": "promptkd", "temperature": "2.5", "rollout-engine": "vllm"}, r"--rollout-engine vllm draws at temperatures from 0.01 to 2, and --temperature is 2.5; give one of these, or leave"),
    "a temperature that vLLM draws as another": ({"method": "promptkd", "temperature": "0.001", "rollout-engine": "vllm"}, r"--rollout-engine vllm draws at temperatures from 0.01 to 2, and --temperature is 0.001"),
    "layers matched in two layouts": ({"hidden-coef": "1", "teacher-ranks": "1"}, r"--hidden-coef 1 matches layers of models in one layout; leave it out, or --teacher-ranks 1", 2),
    "an average of the student in another layout": ({"teacher-model": "self", "teacher-ema": "0.9", "teacher-ranks": "1"}, r"--teacher-ema 0.9 averages the student where it is; leave it out, or --teacher-ranks 1", 2),
    "an average of the student that is away": ({"teacher-model": "self", "teacher-ema": "0.9", "teacher-offload": "True"}, r"--teacher-ema 0.9 averages the student where it is; leave it out, or --teacher-offload"),
    "a teacher that is away in two ways": ({"teacher-offload": "True", "teacher-ranks": "1"}, r"--teacher-offload is for a teacher in the student's layout; leave it out, or --teacher-ranks 1", 2),
    "more stages than layers": ({"pp": "3"}, r"--pipeline-model-parallel-size 3 is more than the 2 layers .*use 2 or fewer", 3),
    "rows longer than the context": ({"max-length": "65"}, r"--max-length 65 is more than the 64 positions of --model .*use --max-length 64 or less"),
    "a soft prompt that does not fit": ({"method": "promptkd", "max-length": "60"}, r"--max-length 60 \+ --prompt-len 7 is more than the 64 .*use --max-length 57"),
    "responses that do not fit": ({"max-new-tokens": "20"}, r"--max-new-tokens 20 after --max-prompt-length 16 is more than --max-length 32; use"),
    "no room for a response": ({"max-prompt-length": "32"}, r"--max-prompt-length 32 leaves no room for a response in --max-length 32; lower it"),
    "a batch that is no whole number": ({"global-batch-size": "5"}, r"--global-batch-size 5 is not a multiple of --micro-batch-size 2 × 1 .*multiple of 2"),
    "a batch larger than the data": ({"global-batch-size": "128"}, r"--global-batch-size 128 is more than the 64 rows"),
    "no such data": ({"train-data": "{root}/nowhere.jsonl"}, r"nowhere.jsonl: No such file or directory; check the path"),
    "empty data": ({"train-data": "{root}/empty.jsonl"}, r"empty.jsonl"),
    "a line that is not JSON": ({"train-data": "{root}/not-json.jsonl"}, r"not-json.jsonl.*line 2|not-json.jsonl:2"),
    "a field of the wrong type": ({"train-data": "{root}/wrong-type.jsonl"}, r"wrong-type.jsonl.*(response|7)"),
    "no responses to learn": ({"train-data": "{root}/no-response.jsonl"}, r"no-response.jsonl.* has no response; training needs"),
    "prompts alone, of which MiniLLM learns text": ({"method": "minillm", "num-rollouts": "4", "train-data": "{root}/no-response.jsonl", "global-batch-size": "1", "micro-batch-size": "1"}, r"no-response.jsonl line 1 has no response; --lm-coef 1 learns it as text: give text with --lm-data, or --lm-coef 0"),
    "prompts alone, half of which are answered": ({"on-policy-ratio": "0.5", "train-data": "{root}/no-response.jsonl"}, r"line 1 has no response; --on-policy-ratio 0.5 learns it in the other batches; give one, or --on-policy-ratio 1"),
    "prompts alone for kd": ({"train-data": "{root}/no-response.jsonl"}, r"line 1 has no response; training needs a field response or output, or --on-policy-ratio 1, with which"),
    "held-out prompts alone": ({"valid-data": "{root}/no-response.jsonl"}, r"no-response.jsonl line 1 has no response; --valid-data is for the loss on it; give one, or leave"),
    "prompts that are all too long": ({"train-data": "{root}/long-prompts.jsonl"}, r"--max-prompt-length"),
    "text without prompts to answer": ({"train-data": "{root}/text.jsonl", "on-policy-ratio": "0.5"}, r"text.jsonl line 1 has no prompt, .*give data with prompts, or"),
    "a mixture of one": ({"kd-objective": "jsd", "beta": "0"}, r"--beta 0.0 leaves jsd no mixture; use a number between 0 and 1"),
    "a policy with dropout": ({"method": "minillm", "attention-dropout": "0.1", "num-rollouts": "4"}, r"--attention-dropout 0.1: MiniLLM's student learns without dropout.*leave it out"),
    "a policy with dropout in its adapters": ({"method": "minillm", "lora-rank": "2", "lora-dropout": "0.1", "num-rollouts": "4"}, r"--lora-dropout 0.1: MiniLLM's student learns without dropout.*leave it out"),
    "a student without a say": ({"method": "minillm", "teacher-mixed-alpha": "1", "num-rollouts": "4"}, r"--teacher-mixed-alpha 1 leaves the student no say .*below 1"),
    "a layer that the student does not have": ({"hidden-coef": "1", "hidden-layers": "3"}, r"--hidden-layers 3: --model \S+ has the layers 1 to 2; name some of them"),
    "a config that names code": ({"model": "{root}/remote-code"}, r"--model .*remote-code: config.json cannot be read .*; give"),
    "the student's own folder for the run": ({"save": "{root}/student"}, r"--save \S+/student holds config.json, and no megakd.json says that pretrain_kd.py made it; give a new"),
    "a file for the run": ({"save": "{root}/good.jsonl"}, r"--save \S+/good.jsonl is a file; give a folder of its own"),
    "a run's folder as a model": ({"model": "{root}/finished-run"}, r"--model \S+: no config.json; give \S+/finished-run/hf$"),
    "a shard that an index names elsewhere": ({"model": "{root}/index-outside"}, r"--model \S+index.json: names the file '../student/model.safetensors', and only one beside it can be meant"),
    "weights that a link leads to elsewhere": ({"teacher-model": "{root}/link-outside"}, r"--teacher-model \S+model.safetensors: leads to \S+, outside its folder; copy that file into the folder"),
    "a template that a link leads to elsewhere": ({"model": "{root}/template-outside"}, r"--model \S+chat_template.jinja: leads to \S+good.jsonl, outside its folder; copy"),
    "a header of 6 GiB": ({"model": "{root}/large-header"}, r"model.safetensors: its header says that it has 6,442,450,936 bytes, and one has at most 33,554,432"),
    "a config of 1 GiB": ({"model": "{root}/large-config"}, r"--model \S+config.json: 1,073,741,824 bytes, and such a file has at most 268,435,456"),
    "a config nested too deeply": ({"model": "{root}/deep-config"}, r"--model \S+config.json: nested too deeply to be read"),
    "a number of layers that is a text": ({"model": "{root}/text-layers"}, r"--model \S+text-layers: config.json .*; give a folder that save_pretrained wrote"),
    "more layers than any model has": ({"model": "{root}/many-layers"}, r"--model \S+many-layers: config.json says more than 100,000 layers"),
    "weights that git left": ({"model": "{root}/lfs"}, r"model.safetensors: is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "a damaged tokenizer": ({"model": "{root}/bad-tokenizer"}, r"bad-tokenizer: its tokenizer does not load \(.*\); "),
    "no end named": ({"model": "{root}/no-end"}, r"no-end/generation_config.json: eos_token_id is \"the end\"; write the id of a token"),
    "data of 12 GiB of zeros": ({"train-data": "{root}/zeros.jsonl"}, r"zeros.jsonl line 1 holds a NUL byte"),
    "a prompt of 4 MiB": ({"train-data": "{root}/huge-prompt.jsonl"}, r"huge-prompt.jsonl line 1: field prompt has 4,194,305 characters, and a text at most 4,194,304"),
    "data that are nested too deeply": ({"train-data": "{root}/deep.jsonl"}, r"deep.jsonl line 1 is not JSON \(lists or objects within each other, too many to be read\)"),
    "a table with a field named twice": ({"train-data": "{root}/twice.csv"}, r"twice.csv line 1 names a field twice: prompt, prompt"),
    "data in another encoding": ({"train-data": "{root}/latin.jsonl"}, r"latin.jsonl line 1: byte 0xe9 is not UTF-8; convert the file to UTF-8"),
    "chats without a template": ({"train-data": "{root}/chats.jsonl"}, r"chats.jsonl line 1 has messages, but the model's tokenizer has no chat template"),
    "settings that refer to themselves": ({"config": "{root}/bomb.yaml"}, r"--config \S+bomb.yaml: not YAML \(a reference \*name to a list or a mapping\)"),
    "settings of a kind of Python's": ({"config": "{root}/python.yaml"}, r"--config \S+python.yaml: not YAML \(could not determine a constructor"),
    "too long a path": ({"train-data": "x/" * 2000}, r"--train-data 'x/.*'\.\.\. has 4,000 bytes, and a path at most 3,800; give a shorter one"),
    "too long a name": ({"save": "{root}/" + "x" * 256}, r"--save '.*'\.\.\. has a name of 256 bytes, and the longest that a file may have is 255"),
    "no such template": ({"prompt-template": "vicuna"}, r"--prompt-template vicuna: no such template; give alpaca, plain or the path of a .jinja file"),
    "a template that never ends": ({"prompt-template": "{root}/loop.jinja"}, r"--prompt-template \S+loop.jinja: TimeoutError: it takes more than 0.2 seconds"),
    "a template of another field": ({"prompt-template": "{root}/field.jinja"}, r"--prompt-template \S+field.jinja: 'question' is undefined; its fields are instruction and input"),
    "an adapter whose base is gone": ({"model": "{root}/lone-adapter"}, r"lone-adapter: adapter_config.json says base_model_name_or_path 'nowhere', which is no folder here"),
    "an adapter of no rank": ({"model": "{root}/no-rank"}, r"--model \S+no-rank: adapter_config.json has r 0, which is no number above 0"),
    "a store that is none": ({"teacher-model": None, "teacher-cache": "{root}/student"}, r"--teacher-cache \S+student: holds no store.json, so it is no teacher's store"),
    "the folder of another run": ({"save": "{root}/other-run"}, r"--lr 5e-05 differs from the 0.1 of the run in --save .*another --save"),
}  # fmt: skip


def command(root: Path, changes: dict) -> list[str]:
    flags = {name: value for name, value in (GOOD | changes).items() if value is not None}
    words = [
        word for name, value in flags.items() for word in (f"--{name}", *([] if value == "True" else [value.replace("{root}", str(root))]))
    ]
    return words


def complain(layout, root: Path, monkeypatch) -> dict[str, str]:
    """The line of every case, from the same function that the command calls; loading a weight would be a failure."""
    monkeypatch.setattr(loading, "build_model", lambda *_, **__: pytest.fail("a model was built"))
    few = lambda files: [file for file in files if file.name != "zeros.jsonl"]  # of whose 12 GiB a checksum takes ten seconds
    monkeypatch.setattr(begun_with, "checksum", lambda files, whole: checksum(few(files), whole=whole))
    monkeypatch.setattr(bounded, "SECONDS", 0.2)
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    lines = {}
    for name, (changes, _, *ranks) in CASES.items():
        os.environ["WORLD_SIZE"] = str(*ranks or [1])
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                trainer.train(parse(command(root, changes)))
            except SystemExit:
                lines[name] = said.getvalue().strip()
            except UserError as error:
                lines[name] = str(error)
    return lines


@pytest.fixture(scope="module")
def lines(inputs):
    """Every case in one forked rank."""
    good = parse(command(inputs, {"save": "{root}/other-run", "lr": "0.1"}))
    (inputs / "other-run" / "checkpoints").mkdir(parents=True)
    (inputs / "finished-run" / "hf").mkdir(parents=True)
    (inputs / "other-run" / "config.yaml").write_text(yaml.safe_dump(good.flat()))
    native.write_latest(inputs / "other-run" / "checkpoints", 7)
    before = sorted(path.relative_to(inputs) for path in inputs.rglob("*"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        (result,) = run_distributed(complain, 1, inputs, monkeypatch)
    assert sorted(path.relative_to(inputs) for path in inputs.rglob("*")) == before, "something was left behind"
    return result


def test_the_table_has_eighty_mistakes():
    assert len(CASES) >= 80


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_ends_in_one_clear_line(lines, name):
    assert name in lines, "nothing was refused"
    assert "\n" not in lines[name], lines[name]
    assert re.search(CASES[name][1], lines[name]), lines[name]



def test_a_mistake_that_rank_zero_does_not_share_is_told_by_whoever_has_it(monkeypatch, capsys):
    monkeypatch.setattr(errors, "GRACE_SECONDS", 0.0)
    for rank, said in {"0": "error: no such file", "3": "error on rank 3: no such file"}.items():
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit:
            errors.fail("no such file")
        assert exit.value.code == 2 and capsys.readouterr().err == f"{said}\n"


def test_code_that_a_config_names_is_never_asked_about(inputs, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        load_hf_config(inputs / "remote-code", flag="--model")


def leave_by_an_error(layout):
    with pytest.raises(KeyError), process_group_closed_at_exit():
        raise KeyError
    return torch.distributed.is_initialized()


def test_no_rank_waits_for_the_others_with_an_error_to_tell():
    assert run_distributed(leave_by_an_error, 1) == [True]
