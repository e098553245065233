"""Files that nobody would write on purpose: whatever stands in them, they are read, or refused in one line that names the file.

Each example damages one good file (its bytes, or one value of its JSON) and opens it as a command would, before any weight. Nothing
but a UserError may come of it, with the file's name or a flag in its one line, and no file may change.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tasks import make_rows
from tiny import tiny_folder
from train_tokenizer import train_tokenizer

from megakd import preflight
from megakd.checkpointing import ModelFolder
from megakd.checkpointing.import_hf import hf_to_native
from megakd.checkpointing.teacher_store import TeacherStore, write_targets
from megakd.checkpointing.torch_dist_save import load_common
from megakd.config import Config, EvaluateConfig, GenerateConfig, from_yaml, parse
from megakd.data.rows import read_rows
from megakd.data.tokenizer import load_tokenizer
from megakd.errors import UserError
from megakd.loading import ModelFolders

EXAMPLES = {"flags": 20, "yaml": 60, "jsonl": 160, "config": 70, "tokenizer": 50, "index": 50, "header": 70, "checkpoint": 100, "adapter": 50, "store": 50}
SHARE = float(os.environ.get("MEGAKD_FUZZ", "0.2"))  # of these; `make drill` takes four times as many
SLOWEST = 20  # seconds of an example: what takes longer hangs, for a user
GOOD_FLAGS = {
    "model": "MODEL", "teacher-model": "MODEL", "train-data": "rows.jsonl", "method": "kd", "train-iters": "3", "lr": "1e-3", "save": "run",
    "global-batch-size": "8", "micro-batch-size": "2", "max-length": "32", "max-prompt-length": "16",
}  # fmt: skip
FLAGS = sorted(Config().flat())

odd_text = st.text(max_size=12) | st.sampled_from(["", "NaN", "-1", "1e999", "0", "~", "\x00", "\ud83d", "None", "[]", "9" * 5000, "💥", "../x"])
odd_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | odd_text | st.just(10**400) | st.just(-1),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=4,
)


def places(value, path=()):
    """Every place in a JSON document."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def with_value(document, path, value):
    """The document with another value at one place."""
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = with_value(document[path[0]], path[1:], value)
    return copy


def without(document, path):
    """The document with the last key of `path` taken away."""
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    rest = {k: v for k, v in holder.items() if k != path[-1]} if isinstance(holder, dict) else [v for i, v in enumerate(holder) if i != path[-1]]
    return with_value(document, path[:-1], rest)


def dumped(document) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


@st.composite
def damaged_json(draw, document, most_places=200):
    """Bytes of the document with one value changed, one key gone, or its bytes damaged."""
    every = list(places(document))[:most_places]
    path = draw(st.sampled_from(every))
    how = draw(st.sampled_from(["value", "value", "value", "without", "bytes"]))
    if how == "value" or not path:
        return dumped(with_value(document, path, draw(odd_value)))
    return dumped(without(document, path)) if how == "without" else draw(damaged_bytes(dumped(document)))


@st.composite
def damaged_bytes(draw, good):
    """The bytes cut off, with some replaced, or with others put in."""
    lo = draw(st.integers(0, len(good)))
    hi = draw(st.integers(lo, min(len(good), lo + 20)))
    patch = draw(st.binary(max_size=8) | st.sampled_from([b"\x00" * 40, b"[" * 100_000, b'"' * 3, b"version https://git-lfs.github.com/spec/v1\n", b"\xff\xfe"]))
    return good[:lo] + patch + (b"" if draw(st.booleans()) and draw(st.booleans()) else good[hi:])


def damaged_safetensors(whole: bytes):
    """A file whose header, or any of whose bytes, are damaged."""
    (length,) = struct.unpack("<Q", whole[:8])
    header, tensors = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    return damaged_json(header).map(lambda data: struct.pack("<Q", len(data)) + data + tensors) | damaged_bytes(whole)


def many(part: str, tests: int = 1) -> int:
    """Examples of a part for one of its tests."""
    return max(2, round(EXAMPLES[part] * SHARE / tests))


def examples(part):
    return settings(
        max_examples=many(part), derandomize=True, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A good folder of every kind."""
    root = tmp_path_factory.mktemp("good")
    rows = make_rows(32, seed=0)
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows])
    tiny_folder(root / "MODEL", "llama", layers=2, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(root / "MODEL")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def folder(good, tmp_path) -> Path:
    """A copy to damage one file of."""
    shutil.copytree(good, tmp_path / "x", dirs_exist_ok=True)
    return tmp_path / "x"


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def refused_in_one_line(folder: Path, *names: str):
    """Only a UserError may leave the block: one line with one of the names. Nothing in the folder changes."""
    before, said, begun = contents(folder), io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            yield
    except (UserError, SystemExit) as error:
        line = str(error) if isinstance(error, UserError) else said.getvalue().strip()
        assert "\n" not in line and len(line) < 2000, line
        assert any(name in line for name in names), (names, line)
    assert time.monotonic() - begun < SLOWEST
    assert contents(folder) == before


@pytest.mark.parametrize("kind", [Config, EvaluateConfig, GenerateConfig], ids=lambda kind: kind.__name__)
def test_any_command_line_is_read_or_refused_in_one_line(kind, folder):
    names = sorted(kind().flat())

    @examples("flags")
    @given(flag=st.sampled_from(names), value=odd_text, more=st.lists(odd_text, max_size=2))
    def check(flag, value, more):
        words = [word for name, good in GOOD_FLAGS.items() if name.replace("-", "_") in names for word in (f"--{name}", good)]
        with refused_in_one_line(folder, "--", "nrecognized", "arguments"):
            parse([*words, "--" + flag.replace("_", "-"), value, *more], kind)

    check()


def test_any_yaml_is_read_or_refused_in_one_line(folder):
    text = yaml.safe_dump(GOOD_FLAGS).encode()
    entries = st.dictionaries(st.sampled_from(FLAGS) | odd_text, odd_value, max_size=3)
    written = entries.map(lambda entries: text + "".join(f"{json.dumps(k)}: {json.dumps(v)}\n" for k, v in entries.items()).encode("utf-8", "surrogatepass"))

    @examples("yaml")
    @given(data=written | damaged_bytes(text))
    def check(data):
        (folder / "run.yaml").write_bytes(data)
        with refused_in_one_line(folder, "run.yaml", "--"):
            from_yaml(folder / "run.yaml").check()

    check()


FORMS = [
    {"prompt": "a b", "response": "c"},
    {"instruction": "Say", "input": "x", "output": ["one", "two"]},
    {"question": "1+1?", "answer": "2 #### 2", "kept": {"a": [1.5, None]}},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"text": "a text"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".jinja"])
def test_any_data_file_is_read_or_refused_in_one_line(suffix, good, folder):
    tokenizer = load_tokenizer(good / "MODEL")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    line = st.sampled_from(FORMS).flatmap(damaged_json)
    plain = b"prompt,response\na b,c\n" if suffix == ".csv" else b"{{ instruction }}\n{% if input %}{{ input }}{% endif %}"
    file = st.lists(line, min_size=1, max_size=3).map(b"\n".join) if suffix.startswith(".json") else damaged_bytes(plain)

    @settings(examples("jsonl"), max_examples=many("jsonl", 5))
    @given(data=file)
    def check(data):
        path = folder / f"data{suffix}"
        path.write_bytes(data)
        with refused_in_one_line(folder, path.name):
            if suffix == ".jinja":
                read_rows(folder / "rows.jsonl", tokenizer, template=str(path))
            else:
                read_rows(path, tokenizer)

    check()


def open_as_a_command_does(folder: Path) -> None:
    """What training looks at before it loads a weight."""
    config = parse([word for name, value in GOOD_FLAGS.items() for word in (f"--{name}", value)])
    preflight.check(config, ModelFolders.open(str(folder / "MODEL")))


JSON_FILES = [("config", "config.json"), ("config", "generation_config.json"), ("tokenizer", "tokenizer.json"), ("tokenizer", "tokenizer_config.json")]


@pytest.mark.parametrize("part, name", JSON_FILES)
def test_any_json_file_of_a_model_is_read_or_refused_in_one_line(part, name, folder):
    document = json.loads((folder / "MODEL" / name).read_text())

    @settings(examples(part), max_examples=many(part, 2))
    @given(data=damaged_json(document))
    def check(data):
        (folder / "MODEL" / name).write_bytes(data)
        with refused_in_one_line(folder, "MODEL", "--"):
            open_as_a_command_does(folder)

    check()


def test_any_index_is_read_or_refused_in_one_line(folder):
    weights = folder / "MODEL" / "model.safetensors"
    shard = weights.rename(weights.with_name("model-00001-of-00001.safetensors"))
    (length,) = struct.unpack("<Q", shard.read_bytes()[:8])
    names = [name for name in json.loads(shard.read_bytes()[8 : 8 + length]) if name != "__metadata__"]
    document = {"metadata": {"total_size": 1}, "weight_map": {name: shard.name for name in names}}

    @examples("index")
    @given(data=damaged_json(document))
    def check(data):
        (folder / "MODEL" / "model.safetensors.index.json").write_bytes(data)
        with refused_in_one_line(folder, "MODEL", "--"):
            open_as_a_command_does(folder)

    check()


def test_any_safetensors_header_is_read_or_refused_in_one_line(folder):
    weights = folder / "MODEL" / "model.safetensors"

    @examples("header")
    @given(data=damaged_safetensors(weights.read_bytes()))
    def check(data):
        weights.write_bytes(data)
        with refused_in_one_line(folder, "MODEL", "--"):
            open_as_a_command_does(folder)

    check()


# ---- checkpoints, adapters, stores


@pytest.fixture
def native(folder) -> Path:
    """A native checkpoint, opened as a command does."""
    return hf_to_native(folder / "MODEL", folder / "checkpoint", tp=1, pp=1, verify=False)


def read_a_tensor(folder: Path) -> None:
    """A whole checkpoint, one of its tensors read."""
    found = ModelFolder.open(folder)
    name = "model.norm.weight"
    found.source.read(name, tuple(slice(0, size) for size in found.source.shape(name)))


SMALL = ["../latest_checkpointed_iteration.txt", "megakd_checkpoint.json", "metadata.json", "huggingface/config.json", ".metadata", "common.pt"]


@pytest.mark.parametrize("name", SMALL)
def test_any_small_file_of_a_checkpoint_is_read_or_refused_in_one_line(name, native, folder):
    file = native / name
    whole = file.read_bytes()
    document = json.loads(whole) if file.suffix == ".json" else None

    @settings(examples("checkpoint"), max_examples=many("checkpoint", len(SMALL)))
    @given(data=damaged_bytes(whole) if document is None else damaged_json(document))
    def check(data):
        file.write_bytes(data)
        with refused_in_one_line(folder, "checkpoint", "--"):
            read_a_tensor(folder / "checkpoint")
            load_common(native)

    check()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_any_file_of_an_adapter_is_read_or_refused_in_one_line(name, folder):
    adapter, linear = folder / "adapter", "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    adapter.mkdir()
    fields = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "MODEL"), "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    save_file({f"{linear}A.weight": torch.ones(2, 64), f"{linear}B.weight": torch.ones(64, 2)}, adapter / "adapter_model.safetensors")
    whole = (adapter / name).read_bytes()

    @settings(examples("adapter"), max_examples=many("adapter", 2))
    @given(data=damaged_json(fields) if name.endswith(".json") else damaged_safetensors(whole))
    def check(data):
        (adapter / name).write_bytes(data)
        with refused_in_one_line(folder, "adapter", "--"):
            source = ModelFolder.open(adapter).source
            source.read("model.layers.0.self_attn.o_proj.weight", (slice(0, 4), slice(0, 4)))

    check()


@pytest.mark.parametrize("name", ["store.json", "targets-00000.safetensors"])
def test_any_file_of_a_teachers_store_is_read_or_refused_in_one_line(name, folder):
    store = folder / "store"
    store.mkdir()
    fields = {
        "kind": "topk", "top_k": 4, "dtype": "float32", "vocab_size": 97, "hidden_size": 64, "teacher": "MODEL", "checksum": "0", "quantize": "none",
        "conditioning": {}, "data": {}, "texts": 1, "rows": 2, "files": 1, "contents": "0", "format": 1,
    }  # fmt: skip
    (store / "store.json").write_text(json.dumps(fields))
    tensors = {"ids": torch.ones(2, 4, dtype=torch.int32), "log_probs": torch.ones(2, 4), "log_rest": torch.ones(2), "log_min": torch.ones(2)}
    write_targets(store, 0, [b"0" * 16], [2], tensors)
    whole = (store / name).read_bytes()

    @settings(examples("store"), max_examples=many("store", 2))
    @given(data=damaged_json(fields) if name.endswith(".json") else damaged_safetensors(whole))
    def check(data):
        (store / name).write_bytes(data)
        with refused_in_one_line(folder, "store", "--"):
            opened = TeacherStore(store)
            opened.read(next(iter(opened._places)))

    check()
