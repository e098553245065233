"""Every form of data a user may bring becomes the samples it should: chats, tables, templates, token files, corpora."""

import json
import struct
import sys

import numpy as np
import pytest
from train_tokenizer import train_tokenizer

from megakd.config import DataConfig
from megakd.data.indexed import IndexedDataset
from megakd.data.open_data import open_prompts, open_responses
from megakd.data.prompt_dataset import PromptDataset
from megakd.data.rows import read_rows
from megakd.data.sft_dataset import SFTDataset
from megakd.data.templates import open_template

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
SETTINGS = DataConfig(max_length=8, max_prompt_length=4)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five six user assistant system"] * 4, vocab_size=300)


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# ---- chats


def test_the_last_assistant_turn_is_the_response_and_the_tokenizer_renders_the_others(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT
    turns = ("system", "one"), ("user", "two"), ("assistant", "three"), ("user", "four"), ("assistant", "five six")
    data = SFTDataset(written(tmp_path / "chat.jsonl", chat(*turns)), tokenizer)
    prompt = "<system>one\n<user>two\n<assistant>three\n<user>four\n<assistant>"
    assert (data.prompt_text(0), data.references(0)) == (prompt, ("five six",))
    assert tokenizer.decode(data[0].prompt + data[0].response) == prompt + "five six<|endoftext|>"

    asked = PromptDataset(written(tmp_path / "asked.jsonl", chat(*turns[:4])), tokenizer)
    assert (asked.prompt_text(0), asked.references(0)) == (prompt, ())


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, chat(("user", "one")), r"the model's tokenizer has no chat template; put a chat_template.jinja"),
        (CHAT, {"messages": "one"}, r'line 1: field messages is "one"; it must be a list of turns'),
        (CHAT, {"messages": [{"role": "user"}]}, r'line 1: a turn of messages is {"role": "user"}; it needs role and content'),
        (CHAT, chat(("assistant", "one")), r"line 1: messages holds an answer alone; put what it answers in front"),
        ("{{ raise_exception('no systems') }}", chat(("system", "one")), r"chat template refuses these messages \(no systems\)"),
    ],
)
def test_a_chat_that_cannot_be_used_is_refused_with_the_way_out(tmp_path, tokenizer, template, row, message):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        read_rows(written(tmp_path / "chat.jsonl", row), tokenizer)


# ---- templates


def test_an_instruction_is_rendered_by_name_or_by_a_file(tmp_path):
    (tmp_path / "own.jinja").write_text("Q: {{ instruction }}{% if input %} ({{ input }}){% endif %}\nA:\n")
    path = written(tmp_path / "data.jsonl", {"instruction": "add", "input": "1 2"}, {"instruction": "sing"})
    prompts = lambda template: [row.prompt for row in read_rows(path, template=template)]
    assert prompts("plain") == ["add\n1 2\n", "sing\n"]
    assert prompts(str(tmp_path / "own.jinja")) == ["Q: add (1 2)\nA:\n", "Q: sing\nA:\n"]
    assert prompts("alpaca")[1].endswith("### Instruction:\nsing\n\n### Response:\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"--prompt-template .*own.jinja: no such template; give alpaca, plain or the path of a .jinja file"),
        ("{{ instruction", r"own.jinja line 1: unexpected end of template.*; correct it"),
        ("{{ question }}", r"own.jinja: 'question' is undefined; its fields are instruction and input"),
    ],
)
def test_a_template_that_is_none_is_refused(tmp_path, text, message):
    if text:
        (tmp_path / "own.jinja").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_template(str(tmp_path / "own.jinja"))


# ---- tables


ROWS = [{"prompt": "one", "response": "two", "note": None}, {"prompt": "three", "response": "four", "note": "x"}]
WANTED = [("one", ("two",)), ("three", ("four",))]


def contents(path):
    return [(row.prompt, row.references) for row in read_rows(path)]


def test_a_table_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").touch()
    with pytest.raises(ValueError, match=r"data.parquet: tables need `pip install pyarrow`; or convert them to .jsonl"):
        read_rows(tmp_path)


def test_folders_are_read_in_the_order_of_their_tables_and_what_holds_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a folder without .parquet or .arrow files"):
        read_rows(tmp_path)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist(ROWS)
    for part in ("b", "a"):
        parquet.write_table(table.slice(part == "b", 1), tmp_path / f"{part}.parquet")
    assert contents(tmp_path) == WANTED and contents(tmp_path / "b.parquet") == WANTED[1:]
    assert read_rows(tmp_path)[1].where == f"{tmp_path} row 1"
    (tmp_path / "b.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"b.parquet is no .parquet file \(.*\); save it again"):
        read_rows(tmp_path)


def test_what_save_to_disk_wrote_is_read_split_by_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.table.InMemoryTable.from_pylist(ROWS)
    table = datasets.Dataset(rows, fingerprint="rows")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    assert contents(tmp_path / "saved") == contents(tmp_path / "splits" / "train") == WANTED
    with pytest.raises(ValueError, match=r"holds the splits train; give the folder of one, as .*splits/train"):
        read_rows(tmp_path / "splits")


# ---- token files

CODES = {"u2": 8, "u4": 9, "i4": 4}


def write_tokens(path, items, dtype="u2"):
    """As MiniLLM's builder writes them: -1 between prompt and response, cast to the dtype."""
    arrays = [np.array(item).astype(dtype) for item in items]
    path.write_bytes(b"".join(array.tobytes() for array in arrays))
    sizes = np.array([len(array) for array in arrays], dtype="<i4")
    offsets = np.cumsum([0, *(array.nbytes for array in arrays)])[:-1].astype("<i8")
    documents = np.arange(len(items) + 1, dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, CODES[dtype], len(items), len(documents))
    path.with_suffix(".idx").write_bytes(header + sizes.tobytes() + offsets.tobytes() + documents.tobytes())


@pytest.mark.parametrize("dtype", CODES)
def test_token_files_of_every_dtype_are_read_over_all_shards(tmp_path, tokenizer, dtype):
    write_tokens(tmp_path / "train_0.bin", [[5, 6, 7, -1, 8, 0], [9, 9, 9, 9, 9, -1, 1]], dtype)
    write_tokens(tmp_path / "train_1.bin", [[1, -1, 2, 0], [1, 2, 3, -1, *range(10, 20)]], dtype)
    write_tokens(tmp_path / "train_3.bin", [[4, -1, 4]], dtype)  # shards count without a gap
    data = open_responses(str(tmp_path / "train_0.bin"), tokenizer, SETTINGS)
    assert [(s.sample_id, s.prompt, s.response) for s in data] == [
        (0, (5, 6, 7), (8, 0)),
        (1, (1,), (2, 0)),  # the item with a prompt of five ids is left out
        (2, (1, 2, 3), (10, 11, 12, 13, 14)),  # cut to eight ids
    ]
    prompts = open_prompts(str(tmp_path / "train_0.idx"), tokenizer, SETTINGS)
    assert [(s.prompt, s.response) for s in prompts] == [((5, 6, 7), ()), ((1,), ()), ((1, 2, 3), ())]
    assert data[-1] == data[2]
    assert data.where(2) == f"{tmp_path / 'train_1.bin'} item 1"


def test_items_without_separator_are_text_or_prompts(tmp_path, tokenizer):
    write_tokens(tmp_path / "train.bin", [[1, 2, 3], [4, 5, 6, 7]])
    assert [(s.prompt, s.response) for s in open_responses(str(tmp_path / "train.bin"), tokenizer, SETTINGS)] == [
        ((), (1, 2, 3)),
        ((), (4, 5, 6, 7)),
    ]
    assert [(s.prompt, s.response) for s in open_prompts(str(tmp_path / "train.bin"), tokenizer, SETTINGS)] == [
        ((1, 2, 3), ()),
        ((4, 5, 6, 7), ()),
    ]


def test_the_same_samples_come_from_text_and_from_its_token_file(tmp_path, tokenizer):
    rows = [{"prompt": "one\n", "response": "two three"}, {"prompt": "four five\n", "response": "six"}]
    text = SFTDataset(written(tmp_path / "train.jsonl", *rows), tokenizer)
    write_tokens(tmp_path / "train_0.bin", [[*s.prompt, -1, *s.response] for s in text])
    lengths = {"max_length": 512, "max_prompt_length": 256}
    assert list(IndexedDataset(tmp_path / "train_0.bin", vocab_size=len(tokenizer), **lengths)) == list(text)


def test_separators_are_found_over_the_borders_of_the_first_pass(tmp_path, monkeypatch):
    items = [[1] * (i % 5) + [-1] + [2] * (i % 3) + ([-1] if i % 2 else []) for i in range(40)]  # a second separator is none
    write_tokens(tmp_path / "train.bin", items)
    monkeypatch.setattr("megakd.data.indexed.IDS_AT_ONCE", 7)
    data = IndexedDataset(tmp_path / "train.bin", vocab_size=2**16, max_length=512, max_prompt_length=256)
    assert [len(s.prompt) for s in data] == [i % 5 for i in range(40)]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda bin, idx: idx.unlink(), r"train_0.idx: no such file; token data are a .bin and the .idx beside it"),
        (lambda bin, idx: idx.write_bytes(b"PK" + idx.read_bytes()), r"train_0.idx does not begin like an index of token data"),
        (lambda bin, idx: idx.write_bytes(idx.read_bytes()[:17] + b"\6" + idx.read_bytes()[18:]), r"dtype code 6, which is no"),
        (lambda bin, idx: idx.write_bytes(idx.read_bytes()[:36]), r"train_0.idx ends before its 2 items do"),
        (lambda bin, idx: bin.write_bytes(bin.read_bytes()[:-4]), r"names 2 items beyond the 5 ids of train_0.bin"),
        (lambda bin, idx: write_tokens(bin, [[1, 400, -1, 2]]), r"train_0.bin holds the id 400, the tokenizer \d+; give"),
        (lambda bin, idx: write_tokens(bin, [[1] * 9 + [-1, 2]]), r"all 1 prompts are longer than --max-prompt-length 4 tokens"),
    ],
)
def test_token_files_that_cannot_be_used_are_named(tmp_path, tokenizer, harm, message):
    file = tmp_path / "train_0.bin"
    write_tokens(file, [[1, -1, 2], [3, -1, 4, 5]])
    harm(file, file.with_suffix(".idx"))
    with pytest.raises(ValueError, match=message):
        open_responses(str(file), tokenizer, SETTINGS)


def test_text_is_asked_for_where_token_files_hold_none(tmp_path, tokenizer):
    write_tokens(tmp_path / "valid_0.bin", [[1, -1, 2]])
    with pytest.raises(ValueError, match=r"valid_0.bin holds token ids, and text is needed here; give the .jsonl"):
        PromptDataset(tmp_path / "valid_0.bin", tokenizer)


# ---- corpora


def test_a_corpus_becomes_full_rows_of_one_stream(tmp_path, tokenizer):
    path = tmp_path / "corpus.txt"
    path.write_text("one two three<@x(x!>four\n\nfive six one two three four five\n")
    data = open_responses(str(path), tokenizer, SETTINGS, full_rows=True)
    ids = [i for sample in data for i in sample.response]
    assert all(sample.prompt == () and len(sample.response) == 8 for sample in data)
    assert "one two three\nfour<|endoftext|>five six one two three four five<|endoftext|>".startswith(tokenizer.decode(ids))
    whole = tokenizer(["one two three\nfour", "five six one two three four five"])["input_ids"]
    assert len(ids) == sum(len(document) + 1 for document in whole) // 8 * 8
    with pytest.raises(ValueError, match="holds less text than a row of --max-length 999 tokens; give more or lower it"):
        SFTDataset(path, tokenizer, max_length=999, full_rows=True)
