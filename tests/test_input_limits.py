"""Huge and hostile files: refused in one line, with the limit, before they cost minutes or memory; nothing outside a folder is read."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import time
import zipfile
from pathlib import Path

import pytest
from tasks import make_rows
from tiny import tiny_folder
from train_tokenizer import train_tokenizer

from megakd import errors, preflight
from megakd.checkpointing.hf_files import copy_hf_files
from megakd.config import from_yaml, parse
from megakd.data import bounded, text_files, values
from megakd.data.rows import read_rows
from megakd.data.templates import open_template
from megakd.data.tokenizer import load_tokenizer
from megakd.errors import UserError
from megakd.loading import ModelFolders

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
FLAGS = {
    "model": "MODEL", "teacher-model": "MODEL", "train-data": "rows.jsonl", "method": "kd", "train-iters": "3", "save": "run",
    "global-batch-size": "8", "micro-batch-size": "2", "max-length": "32", "max-prompt-length": "16",
}  # fmt: skip
SLOWEST, MOST_MORE = 8.0, 700 * 2**20  # seconds and bytes that a refusal may take; the largest sparse file here has 12 GiB


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("good")
    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in make_rows(32, seed=0)])
    tiny_folder(root / "MODEL", "llama", layers=2, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(root / "MODEL")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(32, seed=0)))
    (root / "secret.json").write_text("{}")
    return root


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "x"))


def sparse(file: Path, size: int, *, begin: bytes = b"") -> None:
    with file.open("wb") as stream:
        stream.write(begin)
        stream.truncate(size)


def linked(file: Path, target: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(target)


def indexed(model: Path, **more: str) -> None:
    """The weights as one shard, and an index that names others, too."""
    (model / "model.safetensors").rename(model / "shard.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "shard.safetensors"} | more}))


def packed_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with zipfile.ZipFile(model / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**24)


def large_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive, archive.open("archive/data.pkl", "w", force_zip64=True) as part:
        for _ in range(65):
            part.write(b"\0" * 2**20)


HEADER = 2**25 + 2**20
MODELS = {  # what is done to a good folder; what the line says
    "a header of 6 GiB": (lambda m: sparse(m / "model.safetensors", 6 * 2**30, begin=struct.pack("<Q", 6 * 2**30 - 8)), r"model.safetensors: its header says that it has 6,442,450,936 bytes, and one has at most 33,554,432; copy"),
    "a header of 33 MiB of blanks": (lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", HEADER) + b" " * HEADER), r"its header says that it has 34,603,008 bytes, and one has at most 33,554,432"),
    "a config of 1 GiB": (lambda m: sparse(m / "config.json", 2**30), r"config.json: 1,073,741,824 bytes, and such a file has at most 268,435,456; give the folder that save_pretrained wrote"),
    "a config of 100 MiB": (lambda m: sparse(m / "config.json", 100 * 2**20), r"config.json: 104,857,600 bytes, and such a file has at most 67,108,864; give the file that was meant"),
    "a deep config": (lambda m: (m / "config.json").write_text("[" * 100_000), r"config.json: nested too deeply to be read; copy or download it again"),
    "a number of 5,000 digits": (lambda m: (m / "config.json").write_text('{"hidden_size": ' + "9" * 5000 + "}"), r"config.json: Exceeds the limit \(4300 digits\).*copy or download it again"),
    "a tokenizer of 300 MiB": (lambda m: sparse(m / "tokenizer.json", 300 * 2**20), r"tokenizer.json: 314,572,800 bytes, and such a file has at most 268,435,456"),
    "a deep tokenizer": (lambda m: (m / "tokenizer.json").write_text("[" * 100_000), r"its tokenizer does not load"),
    "a config that is a pipe": (lambda m: ((m / "config.json").unlink(), os.mkfifo(m / "config.json")), r"config.json: is a pipe, a device or a socket, and a regular file is needed; give one"),
    "a template that is a pipe": (lambda m: os.mkfifo(m / "chat_template.jinja"), r"chat_template.jinja: is a pipe, a device or a socket"),
    "a vocabulary that is a device": (lambda m: linked(m / "vocab.json", Path("/dev/zero")), r"vocab.json: leads to /dev/zero, outside its folder; copy that file into the folder"),
    "a config outside": (lambda m: linked(m / "config.json", m.parent / "secret.json"), r"--\S+ \S+/MODEL/config.json: leads to \S+/secret.json, outside its folder; copy that file into the folder"),
    "a template outside": (lambda m: linked(m / "chat_template_x", m.parent / "secret.json"), r"chat_template_x: leads to \S+/secret.json, outside its folder"),
    "a sentencepiece model outside": (lambda m: linked(m / "x.model", m.parent / "secret.json"), r"x.model: leads to \S+/secret.json, outside its folder"),
    "a folder of templates outside": (lambda m: linked(m / "additional_chat_templates", m.parent), r"additional_chat_templates/\S+: leads to \S+, outside its folder"),
    "weights outside": (lambda m: ((m / "model.safetensors").rename(m.parent / "w"), linked(m / "model.safetensors", m.parent / "w")), r"model.safetensors: leads to \S+/w, outside its folder"),
    "an index that names a file above": (lambda m: indexed(m, x="../outside.safetensors"), r"index.json: names the file '../outside.safetensors', and only one beside it can be meant"),
    "an index that names a file anywhere": (lambda m: indexed(m, x="/etc/passwd"), r"index.json: names the file '/etc/passwd', and only one beside it"),
    "an index that names the folder": (lambda m: indexed(m, x=".."), r"index.json: names the file '..', and only one beside it"),
    "an index that names a link": (lambda m: (indexed(m, x="y.safetensors"), linked(m / "y.safetensors", m.parent / "secret.json")), r"y.safetensors: leads to \S+/secret.json, outside its folder"),
    "an index that names too long a file": (lambda m: indexed(m, x="x" * 300), r"File name too long"),
    "a loop of links": (lambda m: (linked(m / "y.safetensors", m / "y.safetensors"), indexed(m, x="y.safetensors")), r"y.safetensors: .*"),
    "a tokenizer's other version": (lambda m: (m / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": ["../x/tokenizer.4.0.json"]})), r"tokenizer_config.json: names the file '../x/tokenizer.4.0.json', and only one beside it"),
    "a packed pickle": (packed_pickle, r"pytorch_model.bin: its part archive/data.pkl is packed, or an index of more than 67,108,864 bytes, and torch.save writes none"),
    "a pickle of 65 MiB": (large_pickle, r"pytorch_model.bin: its part archive/data.pkl is packed, or an index of more than 67,108,864"),
}  # fmt: skip


def cost() -> tuple[float, int]:
    return time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refused(act, pattern: str) -> None:
    """In one line that says so, soon, and with little memory."""
    seconds, peak = cost()
    with pytest.raises(UserError, match=pattern) as error:
        act()
    assert "\n" not in str(error.value) and len(str(error.value)) <= errors.LONGEST + 10
    later, more = cost()
    assert later - seconds < SLOWEST and more - peak < MOST_MORE


def open_as_a_command_does(root: Path) -> None:
    paths = {name: str(root / value) if value in ("MODEL", "rows.jsonl", "run") else value for name, value in FLAGS.items()}
    config = parse([word for name, value in paths.items() for word in (f"--{name}", value)])
    preflight.check(config, ModelFolders.open(str(root / "MODEL")))


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model_is_refused_soon(name, folder):
    damage, pattern = MODELS[name]
    damage(folder / "MODEL")
    refused(lambda: open_as_a_command_does(folder), pattern)


def test_the_hubs_own_cache_is_read(good, tmp_path):
    """A snapshot of links into the blobs beside it, as huggingface_hub makes it."""
    snapshot, blobs = tmp_path / "models--org--name" / "snapshots" / "0123", tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (good / "MODEL").iterdir():
        shutil.copyfile(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-{file.name}")
    (tmp_path / "MODEL").symlink_to(snapshot)  # and the folder itself may be a link
    open_as_a_command_does(tmp_path)
    copy_hf_files(snapshot, tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_bytes() == (good / "MODEL" / "config.json").read_bytes()


def test_a_link_within_its_folder_is_read(folder):
    (folder / "MODEL" / "model.safetensors").rename(folder / "MODEL" / "w.safetensors")
    (folder / "MODEL" / "model.safetensors").symlink_to("w.safetensors")
    open_as_a_command_does(folder)


def test_an_export_holds_no_file_from_elsewhere(folder, tmp_path):
    linked(folder / "MODEL" / "x.model", folder / "secret.json")
    refused(lambda: copy_hf_files(folder / "MODEL", tmp_path / "copy"), r"x.model: leads to \S+/secret.json, outside its folder")
    assert not (tmp_path / "copy" / "x.model").exists()


# ---- data

LONG = "x" * (4 * 2**20 + 1)
DATA = {  # name of the file, what is written into it, what the line says
    "a sparse file of 12 GiB": ("d.jsonl", lambda f: sparse(f, 12 * 2**30), r"d.jsonl line 1 holds a NUL byte"),
    "12 GiB behind a good row": ("d.jsonl", lambda f: sparse(f, 12 * 2**30, begin=json.dumps({"prompt": "a", "response": "b"}).encode() + b"\n"), r"d.jsonl line 2 holds a NUL byte"),
    "a line without end": ("d.jsonl", lambda f: f.write_text('{"prompt": "' + "a" * (17 * 2**20)), r"d.jsonl line 1 has more than 16,777,216 characters; give one row a line, or take it out"),
    "a prompt of 4 MiB": ("d.jsonl", lambda f: f.write_text(json.dumps({"prompt": LONG, "response": "b"})), r"d.jsonl line 1: field prompt has 4,194,305 characters, and a text at most 4,194,304; cut it, or take it out"),
    "a list whose row has no end": ("d.json", lambda f: f.write_text('[{"prompt": "' + "a" * (17 * 2**20)), r"d.json line 1 is not JSON \(Unterminated string.*, or a row of more than 16,777,216 characters\)"),
    "a deep list": ("d.json", lambda f: f.write_text("[" * 1_000_000), r"d.json line 1 is not JSON \(lists or objects within each other, too many to be read\)"),
    "a deep line": ("d.jsonl", lambda f: f.write_text('{"a":' * 100_000), r"d.jsonl line 1 is not JSON \(lists or objects within each other"),
    "deep tools": ("d.jsonl", lambda f: f.write_text(json.dumps(CHAT | {"tools": "[" * 100_000})), r"d.jsonl line 1: field tools is .*; it must be a list of tools, or JSON of one"),
    "a cell of 5 MiB": ("d.csv", lambda f: f.write_text(f"prompt,response\n{LONG},b\n"), r"d.csv line 2 is no row of a table \(field larger than field limit \(4194304\)\)"),
    "a document of 5 MiB": ("d.txt", lambda f: f.write_text(("word " * 200 + "\n") * 5000), r"d.txt line \d+: a document of more than 4,194,304 characters; divide it by blank lines"),
    "a pipe": ("d.jsonl", os.mkfifo, r"d.jsonl: no such data file|d.jsonl: is a pipe"),
    "a device": ("d.jsonl", lambda f: linked(f, Path("/dev/zero")), r"d.jsonl: no such data file|d.jsonl: is a pipe, a device"),
    "a dataset that names a file above": ("d/state.json", lambda f: f.write_text(json.dumps({"_data_files": [{"filename": "../rows.arrow"}]})), r"state.json: names the file '../rows.arrow', and only one beside it can be meant"),
    "a dataset that names nothing": ("d/state.json", lambda f: f.write_text(json.dumps({"_data_files": [{}, 3]})), r"state.json: names the file 'None', and only one beside it"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_hostile_data_are_refused_soon(name, folder):
    file, write, pattern = DATA[name]
    path = folder / file
    path.parent.mkdir(exist_ok=True)
    write(path)
    tokenizer = load_tokenizer(folder / "MODEL")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    refused(lambda: read_rows(path.parent if path.name == "state.json" else path, tokenizer), pattern)


def test_what_is_just_within_the_limits_is_read(folder, monkeypatch):
    monkeypatch.setattr(values, "MOST_TEXT", 100)
    monkeypatch.setattr(text_files, "MOST_LINE", 200)
    tokenizer = load_tokenizer(folder / "MODEL")
    row = lambda prompt: json.dumps({"prompt": "x" * prompt, "response": "b"}) + "\n"
    (folder / "d.jsonl").write_text(row(100) * 3)
    assert len(list(read_rows(folder / "d.jsonl", tokenizer))) == 3
    (folder / "d.jsonl").write_text(row(100) + row(101))
    refused(lambda: list(read_rows(folder / "d.jsonl", tokenizer)), r"d.jsonl line 2: field prompt has 101 characters, and a text at most 100")


# ---- settings

BOMB = "a: &a [x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24))
YAML = {
    "a reference to lists of references": (BOMB, r"c.yaml: not YAML \(a reference \*name to a list or a mapping\); write one `flag-name: value` a line"),
    "lists within lists": ("lr: " + "[" * 5000, r"c.yaml: not YAML \(more than 8 lists or mappings within each other\)"),
    "64 KiB": ("# " + "x" * 2**16, r"--config \S+c.yaml: 65,538 bytes, and such a file has at most 65,536"),
    "a switch that is none": ("lr: !!bool perhaps", r"c.yaml: not YAML \('perhaps'\)"),
    "a time that is none": ("lr: !!timestamp perhaps", r"c.yaml: not YAML \(.*\); write one"),
    "a number of 400 places": ("lr: " + "1:" * 400 + "1.5", r"c.yaml: not YAML \(.*\)|--lr"),
    "a name of Python": ("lr: !!python/name:os.system", r"c.yaml: not YAML \(could not determine a constructor for the tag.*"),
    "a path of 5,000 bytes": ("save: " + "x/" * 2500, r"--save 'x/x/.*'\.\.\. has 5,000 bytes, and a path at most 3,800; give a shorter one"),
    "a name of 300 bytes": ("train-data: " + "x" * 300, r"--train-data 'x+'\.\.\. has a name of 300 bytes, and the longest that a file may have is 255"),
    "a path with a NUL": ('model: "a\\0b"', r"--model 'a\\x00b' holds a NUL character, which no path has; take it out"),
    "half a character in a path": ('model: "a\\ud83d"', r"--model .*holds half of a character|not YAML"),
}


@pytest.mark.parametrize("name", YAML)
def test_hostile_settings_are_refused_soon(name, tmp_path):
    text, pattern = YAML[name]
    (tmp_path / "c.yaml").write_text(text)
    refused(lambda: from_yaml(tmp_path / "c.yaml").check(), pattern)


def test_a_reference_to_one_value_is_read(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: &rate 1e-3\nmin-lr: *rate\n")
    assert from_yaml(tmp_path / "c.yaml").training.min_lr == 1e-3


def test_a_settings_file_of_too_long_a_name_is_refused():
    refused(lambda: from_yaml("x" * 300), r"--config x+: File name too long; check the path")


# ---- templates

TEMPLATES = {
    "a loop that writes nothing": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", r"TimeoutError: it takes more than 0.5 seconds"),
    "a macro that calls itself": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", r"TimeoutError: it takes more than 0.5 seconds"),
    "a constant of 10 GB": ("{{ 'a' * 10000000000 }}", r"MemoryError: it takes more than 1 GiB of memory"),
    "a text of 10 GB": ("{{ 'a' * (10000000000 + 0 * (FIELD | length)) }}", r"MemoryError: it takes more than 1 GiB of memory"),
    "a column of 10 GB": ("{{ '%10000000000d' | format(1) }}", r"Error: "),
    "5 MB": ("{{ FIELD }}{{ 'a' * 5000000 }}", r"ValueError: it writes 5,000,0\d\d characters, and a text has at most 4,194,304"),
    "Python's own classes": ("{{ FIELD.__class__.__mro__ }}", r"unsafe|undefined"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_prompt_template_is_ended(name, tmp_path, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.5)
    text, pattern = TEMPLATES[name]
    (tmp_path / "t.jinja").write_text(text.replace("FIELD", "instruction"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    refused(lambda: open_template(str(tmp_path / "t.jinja")), r"--prompt-template \S+t.jinja: .*" + pattern)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_chat_template_is_ended(name, folder, monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.5)
    text, pattern = TEMPLATES[name]
    (folder / "d.jsonl").write_text(json.dumps(CHAT))
    tokenizer = load_tokenizer(folder / "MODEL")
    tokenizer.chat_template = text.replace("FIELD", "messages")
    refused(lambda: read_rows(folder / "d.jsonl", tokenizer), rf"d.jsonl line 1: the chat template \w+ (on )?these messages \(.*({pattern})")


def test_a_prompt_template_of_a_mebibyte_is_refused(tmp_path):
    sparse(tmp_path / "t.jinja", 2**20 + 1)
    refused(lambda: open_template(str(tmp_path / "t.jinja")), r"--prompt-template \S+t.jinja: 1,048,577 bytes, and such a file has at most 1,048,576")


def test_a_clock_leaves_no_alarm_behind():
    with bounded.limited_seconds(5):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
