"""Files as people have them are read a piece at a time; what cannot be read, kept or written again is named with file and line."""

import csv
import gzip
import io
import json
import random
import subprocess
import sys

import pytest
from train_tokenizer import train_tokenizer

from megakd.data.rows import read_rows

ROWS = [
    {"prompt": "one, \"two\"\nthree", "output": "vier 😀 \u2028 fünf"},
    {"prompt": "six", "output": "seven\r\neight"},
    {"prompt": "nine [", "output": "] ten, {"},
]  # fmt: skip
WANTED = [(row["prompt"], (row["output"],)) for row in ROWS]


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    table = csv.DictWriter(text, ["prompt", "output"], delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


FILES = {
    "data.jsonl": as_jsonl(ROWS),
    "lines.json": as_jsonl(ROWS),
    "list.json": json.dumps(ROWS),
    "indented.json": "\ufeff\n" + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n",
    "list.jsonl": json.dumps(ROWS),
    "data.csv": as_csv(ROWS),
    "data.tsv": "\ufeff" + as_csv(ROWS, "\t"),
}


def contents(path):
    """Newlines within a cell of a table are newlines."""
    return [(row.prompt, tuple(text.replace("\r\n", "\n") for text in row.references)) for row in read_rows(path)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("piece", [3, 2**16])
@pytest.mark.parametrize("name", FILES)
def test_every_form_of_file_is_read(tmp_path, monkeypatch, name, piece, packed):
    monkeypatch.setattr("megakd.data.text_files.PIECE", piece)
    monkeypatch.setattr("megakd.data.json_files.PIECE", piece)
    data = FILES[name].encode()
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert contents(path) == [(prompt, tuple(text.replace("\r\n", "\n") for text in texts)) for prompt, texts in WANTED]


def test_text_is_read_packed_or_not_and_named_gz_or_not(tmp_path):
    text = "\r\n\r\none two\r\nthree\r\n \r\n\r\nfour\r\n"
    for name, data in {"a.txt": text.encode(), "b.txt.gz": gzip.compress(text.encode()), "c.txt": gzip.compress(text.encode())}.items():
        (tmp_path / name).write_bytes(data)
        assert [row.references for row in read_rows(tmp_path / name)] == [("one two\nthree",), ("four",)]
        assert read_rows(tmp_path / name).where(1) == f"{tmp_path / name} document 2"


def test_an_empty_cell_is_no_field_of_its_row(tmp_path):
    (tmp_path / "data.csv").write_text("instruction,input,output,prompt\none,,two,\n\n,,three,four\n")
    rows = read_rows(tmp_path / "data.csv", template="plain")
    assert [(row.prompt, row.references, row.where[-6:]) for row in rows] == [
        ("one\n", ("two",), "line 2"),
        ("four", ("three",), "line 4"),
    ]


BAD = '{"prompt": "a", "output": "b", "note": %s}'
REFUSED = {  # name: file, what it holds, the message
    "half a surrogate pair": ("x.jsonl", BAD % r'"\ud83d"', r"x.jsonl line 2: field note holds U\+D83D \(half a surrogate pair, .*\) at character 1; take it out"),
    "half a pair, deep": ("x.jsonl", BAD % r'[{"k": ["ok \udc00"]}]', r"line 2: field note holds U\+DC00 .* at character 4; take"),
    "half a pair as a name": ("x.jsonl", r'{"prompt": "a", "\ud800": 1}', r"line 2: the name of a field holds U\+D800"),
    "an escaped NUL": ("x.jsonl", BAD % r'"a\u0000"', r"line 2: field note holds U\+0000 \(NUL\) at character 2; take it out"),
    "a NUL byte": ("x.jsonl", "\0\0\0", r"x.jsonl line 2 holds a NUL byte, which no text does"),
    "a NUL byte in text": ("x.txt", "a\0", r"x.txt line 2 holds a NUL byte"),
    "a number of 6,000 digits": ("x.jsonl", BAD % ("7" * 6000), r"line 2 is not JSON \(Exceeds the limit \(4300 digits\) .*\): {\"prompt"),
    "brackets within brackets": ("x.jsonl", BAD % ("[" * 100_000), r"line 2 is not JSON \(lists or objects within each other, too many to be read\): "),
    "levels that cannot be written": ("x.jsonl", BAD % ("[" * 150 + "]" * 150), r"line 2: field note has more than 100 lists or objects within"),
    "NaN": ("x.jsonl", BAD % "NaN", r"line 2 is not JSON \(NaN is no number\): .*; fix it"),
    "infinity": ("x.jsonl", BAD % "-Infinity", r"line 2 is not JSON \(-Infinity is no number\)"),
    "a number too large": ("x.jsonl", BAD % "1e999", r"line 2 is not JSON \(1e999 is too large a number\)"),
    "not UTF-8": ("x.jsonl", BAD.encode() % b'"caf\xe9"', r"x.jsonl line 2: byte 0xe9 is not UTF-8; convert the file to UTF-8"),
    "a list that ends": ("list.json", '[{"prompt": "a"},\n {"prompt"', r"list.json line 3 is not JSON \(.*\); fix it"),
    "a list without a comma": ("list.json", '[{"prompt": "a"}\n {"prompt": "b"}]', r"list.json line 3 is not JSON \({ stands where , or \] should\)"),
    "a list with a tail": ("list.json", '[{"prompt": "a"}]\n[]', r"list.json line 3 is not JSON \(\[ stands after the end of the list\)"),
    "a list of numbers": ("list.json", "[1, 2]", r"list.json row 1 is 1, not a JSON object; it needs prompt with response"),
    "a large number in a list": ("list.json", '[\n{"prompt": "a", "n": %s}]' % ("7" * 6000), r"list.json line 3 is not JSON \(Exceeds the limit"),
    "half a pair in a list": ("list.json", r'[{"prompt": "a"}, {"prompt": "\ud83d"}]', r"list.json row 2: field prompt holds U\+D83D"),
    "an object over several lines": ("x.json", '{\n"prompt": "a"\n}', r"x.json line 2 is not JSON \(Expecting property name .*\): {; fix it"),
    "too many cells": ("x.csv", "prompt,output\na,b,c", r"x.csv line 3 has 3 cells, the first line 2 names; quote a cell that holds ','"),
    "a quote that never ends": ("x.csv", 'prompt,output\na,b\nc,"d\ne', r"x.csv line 4 is no row of a table \(unexpected end of data\); fix its quotes"),
    "a name twice": ("x.csv", "prompt,prompt\na,b", r"x.csv line 1 names a field twice: prompt, prompt"),
    "other names": ("x.csv", "q;a\n1;2", r"x.csv line 3 has the fields q;a; it needs prompt with response"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_row_may_hold_is_named_with_file_line_and_field(tmp_path, case):
    name, text, message = REFUSED[case]
    first = '{"prompt": "a", "output": "b"}\n' if name == "x.jsonl" else "\n"
    data = first.encode() + (text if isinstance(text, bytes) else text.encode())
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(tmp_path / name)
    assert len(str(caught.value)) < len(str(tmp_path)) + 300 and str(caught.value).isprintable()


def test_a_packed_file_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(as_jsonl(ROWS * 99).encode())[:-20])
    with pytest.raises(ValueError, match=r"x.jsonl.gz: the packed file is cut off or damaged \(.*\); copy or download it again"):
        read_rows(tmp_path / "x.jsonl.gz")


def test_what_save_to_disk_never_wrote_is_named(tmp_path):
    for text, message in {"{": r"state.json: not JSON", "[]": r"state.json names no _data_files, as `save_to_disk` does"}.items():
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path)


# ---- memory

PEAK = """
import sys
from pathlib import Path
from megakd.data.sft_dataset import SFTDataset
from megakd.data.tokenizer import load_tokenizer

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

small, path, tokenizer = sys.argv[1:]
tokenizer = load_tokenizer(tokenizer)
SFTDataset(small, tokenizer)  # what the first call of all needs
before = memory("VmRSS")
data = SFTDataset(path, tokenizer)
print((memory("VmHWM") - before) / Path(path).stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["data.jsonl", "list.json"])
def test_reading_takes_at_most_four_times_the_file(tmp_path, form):
    rng = random.Random(0)
    words = ["".join(rng.choices("aeinorst", k=5)) for _ in range(500)]
    train_tokenizer([" ".join(words)] * 4, vocab_size=4000).save_pretrained(tmp_path / "tokenizer")
    rows = [
        {"instruction": " ".join(rng.choices(words, k=12)), "input": "", "output": " ".join(rng.choices(words, k=100)), "category": "open_qa"}
        for _ in range(7_000)
    ]  # 5 MB, rows as long as Dolly's
    for name, part in {"small.jsonl": rows[:900], form: rows}.items():
        (tmp_path / name).write_text(json.dumps(part) if name.endswith("json") else as_jsonl(part))
    arguments = [str(tmp_path / name) for name in ("small.jsonl", form, "tokenizer")]
    done = subprocess.run([sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4, done.stdout
