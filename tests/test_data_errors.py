"""A data file, tokenizer or length that cannot be used is refused in one line: what, which value, and the way out."""

import json

import pytest
from train_tokenizer import train_tokenizer

from megakd.data.prompt_dataset import PromptDataset
from megakd.data.sft_dataset import SFTDataset
from megakd.data.tokenizer import check_same_tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a word and another word, and a third: one two three four five six"] * 4, vocab_size=300)


def written(tmp_path, *lines, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"prompt": "a word\n", "response": "one two"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty; it needs one JSON object a line"),
        (["", "  "], "is empty; it needs one JSON object a line"),
        ([GOOD, '{"prompt": "a'], r"line 2 is not JSON \(Unterminated string .* at column 12\): {\"prompt\": \"a; fix it"),
        ([GOOD, "[1, 2]"], r"line 2 is \[1, 2\], not a JSON object; it needs prompt with response"),
        ([GOOD, {"prompt": "a", "output": 7}], "line 2: field output is 7; it must be a text or a list of texts"),
        ([{"prompt": "a", "output": ["b", 7]}], r"line 1: field output is \[\"b\", 7\]; it must be a text or a list of texts"),
        ([{"prompt": None, "output": "b"}], "line 1: field prompt is null; it must be a text"),
        ([{"instruction": "a", "input": 3, "output": "b"}], "line 1: field input is 3; it must be a text"),
        ([GOOD, {"q": "a", "a": "b"}], "line 2 has the fields q, a; it needs prompt with response"),
        ([GOOD, {"prompt": "a"}], "line 2 has no response; training needs a field response or output"),
        ([{"prompt": "a", "output": []}], "line 1 has no response"),
        ([{"prompt": "one " * 40, "response": "b"}], "all 1 prompts are longer than --max-prompt-length 20 tokens; the"),
        ([{"text": ""}], "holds no text; its documents have no tokens to learn"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_line_value_and_way_out(tmp_path, tokenizer, lines, message):
    path = written(tmp_path, *lines)
    with pytest.raises(ValueError, match=message) as caught:
        SFTDataset(path, tokenizer, max_prompt_length=20)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_one_that_is_not_text_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"nowhere.jsonl: no such data file; give the path of a .jsonl or .txt file"):
        SFTDataset(tmp_path / "nowhere.jsonl", tokenizer)
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin.jsonl line 1: byte 0xe9 is not UTF-8; convert the file"):
        SFTDataset(tmp_path / "latin.jsonl", tokenizer)


def test_lengths_that_leave_no_room_for_a_response_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="--max-prompt-length 64 leaves no room for a response in --max-length 64; lower it"):
        SFTDataset(written(tmp_path, GOOD), tokenizer, max_length=64, max_prompt_length=64)


def test_an_empty_prompt_cannot_be_answered_nor_a_text_of_one_token_continued(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"line 1 has an empty prompt; a model needs at least one token to continue"):
        PromptDataset(written(tmp_path, {"prompt": ""}), tokenizer)
    with pytest.raises(ValueError, match=r"data.jsonl holds no text of two tokens or more; there is nothing to continue"):
        PromptDataset(written(tmp_path, {"text": "a"}), tokenizer)


def test_the_forms_of_a_row_and_a_file_without_responses_are_read(tmp_path, tokenizer):
    path = written(
        tmp_path,
        GOOD,
        {"prompt": "a word\n", "output": ["one", "two"]},
        {"instruction": "a", "output": "two\u2028three"},  # a line separator inside a string does not end the line
        {"instruction": "a", "input": "b", "output": ""},
    )
    data = SFTDataset(path, tokenizer)
    assert [data.references(i) for i in range(4)] == [("one two",), ("one", "two"), ("two\u2028three",), ("",)]
    assert data.prompt_text(2).endswith("### Instruction:\na\n\n### Response:\n")
    assert data.prompt_text(3).endswith("### Input:\nb\n\n### Response:\n")
    assert data[3].response == (tokenizer.eos_token_id,)
    assert [data[i].sample_id for i in (0, 3, -1)] == [0, 3, 3]

    prompts = PromptDataset(written(tmp_path, {"prompt": "a word\n"}), tokenizer)
    assert (prompts[0].prompt, prompts[0].response, prompts.references(0)) == (data[0].prompt, (), ())


def test_plain_text_is_cut_into_pieces_that_lose_nothing(tmp_path, tokenizer):
    path = written(tmp_path, "one two three\nfour five six", "", "a word and another word", name="data.txt")
    data = SFTDataset(path, tokenizer, max_length=4, max_prompt_length=2)
    ids = [i for sample in data for i in sample.prompt + sample.response]
    assert tokenizer.decode(ids).split("<|endoftext|>") == ["one two three\nfour five six", "a word and another word", ""]
    assert all(sample.prompt == () and len(sample.response) <= 4 for sample in data)


def test_prompts_of_plain_text_are_its_openings(tmp_path, tokenizer):
    path = written(tmp_path, "one two three four five six", "", "one two three four", name="data.txt")
    data = PromptDataset(path, tokenizer, max_prompt_length=3)
    assert [(data.prompt_text(i), data.references(i)) for i in range(2)] == [
        ("one two three", (" four five six",)),
        ("one two", (" three four",)),
    ]


def test_a_token_across_the_border_makes_the_row_encode_apart(tmp_path):
    merging = train_tokenizer(["ab ab ab ab"] * 4, vocab_size=300)
    data = SFTDataset(written(tmp_path, {"prompt": "a", "response": "b"}), merging)
    assert len(merging("ab")["input_ids"]) == 1
    assert [merging.decode(part) for part in (data[0].prompt, data[0].response[:-1])] == ["a", "b"]


def test_a_folder_without_tokenizer_files_says_which(tmp_path):
    with pytest.raises(ValueError, match=r"holds none of tokenizer.json, tokenizer.model, vocab.json; copy the model's"):
        load_tokenizer(tmp_path)
    for broken in ("{}", '{"version": "1.0", "tru'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match=r"its tokenizer does not load \(.*\); the folder needs tokenizer.json"):
            load_tokenizer(tmp_path)


def test_different_tokenizers_are_refused_with_the_first_id_that_differs(tokenizer):
    check_same_tokenizer(tokenizer, tokenizer)
    other = train_tokenizer(["other texts, other merges"] * 4, vocab_size=300)
    with pytest.raises(ValueError, match=r"different tokenizers: id \d+ is '.+' for the teacher and '.+' for the student"):
        check_same_tokenizer(tokenizer, other)


def test_long_prompts_are_counted_once(tmp_path, tokenizer, noted, monkeypatch):
    path = written(tmp_path, GOOD, {"prompt": "one " * 40, "response": "b"}, {"prompt": "two " * 40, "response": "b"})
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        data = SFTDataset(path, tokenizer, max_prompt_length=20)
        assert len(data) == 1
    assert noted.messages == [f"{path}: left out 2 of 3 rows, prompt longer than 20 tokens"]
