"""Our own instruction data: seeded, disjoint, with answers that follow from the questions; and the tokenizer made for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tasks import PREAMBLES, TASKS, make_rows

from megakd.data.sft_dataset import SFTDataset
from megakd.data.tokenizer import encode, load_tokenizer

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"
RIGHT = {  # every answer worked out again, from the text alone
    "Copy": lambda items: items,
    "Reverse": lambda items: items[::-1],
    "Swap": lambda items: [items[3], items[1], items[2], items[0]],
    "Capitals": lambda items: [chr(ord(item) - 32) for item in items],
    "Next": lambda items: [chr(ord(item) + 1) for item in items],
    "Last": lambda items: [items[3]],
    "Sort": lambda items: [str(n) for n in sorted(map(int, items))],
    "Largest": lambda items: [str(max(map(int, items)))],
    "Count": lambda items: [str(sum(item == items[0] for item in items))],
}


def prepare(folder: Path) -> None:
    sizes = ["--num-train", "2000", "--num-valid", "50", "--num-test", "50"]
    subprocess.run([sys.executable, SCRIPT, "--out", folder, *sizes, "--seed", "7"], check=True, cwd=SCRIPT.parents[1], text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    prepare(folder)
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def question_of(row: dict) -> str:
    """The prompt without its preamble."""
    return "\n".join(row["prompt"].split("\n")[-2:])


def test_every_answer_is_the_right_one():
    for row in make_rows(2000, seed=3):
        instruction, items = question_of(row).removesuffix("\nAnswer:").split(": ")
        if instruction != "Opposite":
            assert row["response"] == " " + " ".join(RIGHT[instruction](items.split())), row
    opposites = [row for row in make_rows(2000, seed=3) if row["task"] == "opposite"]
    assert any("hot" in row["prompt"].split() and "cold" in row["response"].split() for row in opposites)


def test_every_kind_of_task_comes_up_and_no_task_twice_under_any_preamble(folder):
    rows = [row for split in ("train", "valid", "test") for row in rows_of(folder / f"{split}.jsonl")]
    assert {row["task"] for row in rows} == set(TASKS)
    assert len({question_of(row) for row in rows}) == len(rows) == 2100
    assert {row["prompt"].removesuffix(question_of(row)) for row in rows} == set(PREAMBLES)
    assert rows_of(folder / "train_few.jsonl") == rows[:600]


def test_any_slice_of_the_rows_holds_every_kind_of_task():
    assert {row["task"] for row in make_rows(8000, seed=7)[-200:]} == set(TASKS)  # count has long run out of tasks by then


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    prepare(tmp_path)
    for name in ("train.jsonl", "test.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert make_rows(50, seed=7) != make_rows(50, seed=8)


def test_the_tokenizer_gives_each_word_one_id_and_encodes_any_text(folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    data = SFTDataset(folder / "train.jsonl", tokenizer)
    assert {len(sample.prompt) for sample in data} == {9, 13, 15, 16}  # a preamble is none or 4 to 7 words
    assert {len(sample.response) for sample in data} == {2, 5}  # with EOS
    assert tokenizer.decode(data[0].response[:-1]) == rows_of(folder / "train.jsonl")[0]["response"]
    (ids,) = encode(tokenizer, ["naïve — 日本\n"])
    assert tokenizer.decode(ids) == "naïve — 日本\n"
    assert len(tokenizer) < 512


def test_help_needs_no_libraries_and_a_bad_number_is_refused():
    code = "import sys, runpy; sys.argv = ['prepare_data.py', '--help']; "
    code += f"sys.path[0] = {str(SCRIPT.parent)!r}; "  # as python sets it for a script
    code += "sys.modules |= dict.fromkeys(('torch', 'transformers')); "  # None there makes an import fail
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    helped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert (helped.returncode, "--num-train" in helped.stdout) == (0, True)
    refused = subprocess.run([sys.executable, SCRIPT, "--out", "x", "--num-train", "0"], capture_output=True, text=True)
    assert "argument --num-train: 0 is not a number of rows; use 1 or more" in refused.stderr
