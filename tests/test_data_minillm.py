"""The facts of the published MiniLLM data hold for our reader: template, token ids, counts, lengths, labels."""

import json
import os
from pathlib import Path

import pytest

from megakd.data.prompt_dataset import PromptDataset
from megakd.data.sft_dataset import SFTDataset
from megakd.data.templates import render_prompt
from megakd.data.tokenizer import encode, load_tokenizer

DATA = Path(os.environ.get("MEGAKD_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
MINILLM = DATA / "minillm"
EOS = 50256
pytestmark = pytest.mark.skipif(not MINILLM.is_dir(), reason=f"no MiniLLM data at {MINILLM}; set MEGAKD_TEST_DATA")

ROWS = {
    "dolly/train.jsonl": 11435,
    "dolly/dev.jsonl": 1000,
    "dolly/valid.jsonl": 500,
    "self-inst/valid.jsonl": 242,
    "sinst/11_/valid.jsonl": 1694,
    "vicuna/valid.jsonl": 80,
}
LENGTHS = {  # prompt min, max; first reference min, max, how many under 11: ids of GPT-2
    "dolly/dev.jsonl": (34, 255, 1, 1007, 110),
    "dolly/valid.jsonl": (33, 256, 1, 1792, 49),
    "self-inst/valid.jsonl": (38, 248, 1, 780, 48),
    "sinst/11_/valid.jsonl": (80, 256, 11, 75, 0),
    "vicuna/valid.jsonl": (39, 68, 85, 722, 0),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DATA / "tokenizers" / "gpt2")


@pytest.fixture(scope="module")
def dev(tokenizer):
    return SFTDataset(MINILLM / "dolly/dev.jsonl", tokenizer)


def rows_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (MINILLM / name).read_text().split("\n") if line]


@pytest.mark.parametrize("name", ROWS)
def test_the_template_renders_every_stored_prompt_to_the_byte(name):
    rows = rows_of(name)
    assert len(rows) == ROWS[name]
    assert [render_prompt(row["instruction"], row.get("input", "")) for row in rows] == [row["prompt"] for row in rows]


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_are_those_measured_on_the_released_files(name, tokenizer):
    data = SFTDataset(MINILLM / name, tokenizer, max_length=100_000)
    assert len(data) == ROWS[name]
    prompts = [len(sample.prompt) for sample in data]
    responses = [len(sample.response) - 1 for sample in data]  # without EOS
    assert (min(prompts), max(prompts), min(responses), max(responses), sum(n < 11 for n in responses)) == LENGTHS[name]


def test_ids_are_prompt_and_output_encoded_together_with_eos(dev, tokenizer):
    rows = rows_of("dolly/dev.jsonl")
    whole = encode(tokenizer, [row["prompt"] + row["output"] for row in rows])
    assert [sample.prompt + sample.response for sample in dev] == [(*ids, EOS)[:512] for ids in whole]
    assert encode(tokenizer, ["Suppose you are a student."]) == [[15979, 577, 345, 389, 257, 3710, 13]]


def test_rows_over_512_lose_their_tail_and_eos(dev):
    lengths = [len(sample.prompt) + len(sample.response) for sample in dev]
    cut = [sample for sample, length in zip(dev, lengths) if length == 512 and sample.response[-1] != EOS]
    assert max(lengths) == 512
    assert len(cut) == 18
    assert all(sample.response[-1] == EOS for sample, length in zip(dev, lengths) if length < 512)


def test_every_reference_is_kept_and_the_first_is_learnt(tokenizer):
    data = SFTDataset(MINILLM / "sinst/11_/valid.jsonl", tokenizer)
    rows = rows_of("sinst/11_/valid.jsonl")
    counts = [len(data.references(i)) for i in range(len(data))]
    assert (min(counts), max(counts)) == (1, 20)
    assert [data.references(i) for i in range(len(data))] == [tuple(row["output"]) for row in rows]
    assert tokenizer.decode(data[3].response[:-1]) == rows[3]["output"][0]


def test_prompts_alone_are_the_prompts_of_training(dev, tokenizer):
    prompts = PromptDataset(MINILLM / "dolly/dev.jsonl", tokenizer)
    assert [sample.prompt for sample in prompts] == [sample.prompt for sample in dev]
    assert all(sample.response == () for sample in prompts)
    assert prompts.prompt_text(5) == rows_of("dolly/dev.jsonl")[5]["prompt"]


def test_the_training_set_has_all_its_rows_and_no_prompt_over_256(tokenizer):
    prompts = PromptDataset(MINILLM / "dolly/train.jsonl", tokenizer)
    assert len(prompts) == 11435
    assert max(len(sample.prompt) for sample in prompts) == 256


def test_long_prompts_are_left_out_and_counted_in_one_line(tokenizer, noted):
    data = SFTDataset(MINILLM / "vicuna/valid.jsonl", tokenizer, max_prompt_length=50)
    left_out = sum(len(ids) > 50 for ids in encode(tokenizer, [row["prompt"] for row in rows_of("vicuna/valid.jsonl")]))
    assert len(data) == 80 - left_out
    assert noted.messages == [
        f"{MINILLM / 'vicuna/valid.jsonl'}: left out {left_out} of 80 rows, prompt longer than 50 tokens"
    ]
