"""A row means one thing: which fields are read, and what is told; what generate.py writes is learnt as it was generated."""

import json

import pytest
from train_tokenizer import train_tokenizer

from megakd.config import ResponseConfig
from megakd.data.end_ids import EndIds
from megakd.data.prompt_dataset import PromptDataset
from megakd.data.rows import read_rows
from megakd.data.sft_dataset import SFTDataset
from megakd.data.templates import render_prompt
from megakd.generation.write_responses import Prompts

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
ASKED = [{"role": "system", "content": "one"}, {"role": "user", "content": "two"}]
GOLD = {"role": "assistant", "content": "GOLD"}
RENDERED = "<system>one\n<user>two\n<assistant>"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["one two three four five six user assistant system GOLD answer"] * 4, vocab_size=320)
    tokenizer.chat_template = CHAT
    return tokenizer


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learnt(tmp_path, tokenizer, *rows):
    """Prompt and response of every row, as text of the ids."""
    data = SFTDataset(written(tmp_path / "data.jsonl", *rows), tokenizer)
    return [(tokenizer.decode(s.prompt), tokenizer.decode(s.response).removesuffix(tokenizer.eos_token)) for s in data]


# ---- which field is read

READ = {  # row: prompt and response that are learnt, and what is told
    "response before output": (
        {"prompt": "one", "output": "two", "response": "three"},
        ("one", "three"),
        "has response and output; response is read, output is not",
    ),
    "completion before answer": (
        {"prompt": "one", "answer": "two", "completion": "three"},
        ("one", "three"),
        "has completion and answer; completion is read, answer is not",
    ),
    "one answer twice": ({"prompt": "one", "output": ["two"], "response": "two"}, ("one", "two"), ""),
    "messages before prompt": (
        {"prompt": "two", "messages": [*ASKED, GOLD]},  # UltraChat
        (RENDERED, "GOLD"),
        "has messages and prompt; messages is read, prompt is not",
    ),
    "prompt before another instruction": (
        {"instruction": "two", "prompt": "one", "response": "three"},
        ("one", "three"),
        "has prompt and instruction; prompt is read, instruction is not",
    ),
    "a prompt that is the instruction rendered": (  # MiniLLM
        {"instruction": "two", "prompt": render_prompt("two"), "output": "three"},
        (render_prompt("two"), "three"),
        "",
    ),
    "a text that is all of it": (  # Alpaca
        {"instruction": "two", "text": render_prompt("two") + "three", "output": "three"},
        (render_prompt("two"), "three"),
        "",
    ),
    "instruction before another text": (
        {"instruction": "two", "text": "four", "output": "three"},
        (render_prompt("two"), "three"),
        "has instruction and text; instruction is read, text is not",
    ),
    "a context beside an instruction": (  # Dolly
        {"instruction": "two", "context": "four", "output": "three"},
        (render_prompt("two"), "three"),
        "has context, which is not in the prompt; call it input if it should be",
    ),
    "a system prompt beside a question": (  # OpenOrca
        {"system_prompt": "four", "question": "two", "response": "three"},
        (render_prompt("two"), "three"),
        "has system_prompt, which is not in the prompt; put it into question if it should be",
    ),
    "an input that is rendered": (
        {"instruction": "two", "input": " four", "context": "", "prompt": render_prompt("two", " four"), "output": "three"},
        (render_prompt("two", " four"), "three"),
        "",
    ),
    "a chat without an answer and a response": ({"messages": ASKED, "response": "four"}, (RENDERED, "four"), ""),
    "the same answer twice in a chat": ({"messages": [*ASKED, GOLD], "response": " GOLD"}, (RENDERED, "GOLD"), ""),
    "turns as prompt and completion": ({"prompt": ASKED, "completion": [GOLD]}, (RENDERED, "GOLD"), ""),  # TRL
    "turns as prompt and a text": ({"prompt": ASKED, "completion": "GOLD"}, (RENDERED, "GOLD"), ""),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_decided_and_what_is_passed_over_is_told(tmp_path, tokenizer, noted, name):
    row, wanted, told = READ[name]
    assert learnt(tmp_path, tokenizer, row) == [wanted]
    assert noted.messages == ([f"{tmp_path / 'data.jsonl'} line 1: {told}"] if told else [])


def test_what_is_told_of_many_rows_is_one_line(tmp_path, tokenizer, noted, monkeypatch):
    row = {"prompt": "one", "output": "two", "response": "three"}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        learnt(tmp_path, tokenizer, {"prompt": "one", "response": "two"}, *[row] * 1001)
    (line,) = noted.messages
    assert line.startswith(f"{tmp_path / 'data.jsonl'} line 2 and 1,000 more rows: has response and output; ")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [*ASKED, GOLD], "response": "four"}, r"line 1 has two answers: messages end with GOLD, and another field says four; take"),
        ({"prompt": [*ASKED, GOLD], "completion": [{**GOLD, "content": "four"}]}, r"line 1 has two answers: .* GOLD, .* four"),
        ({"prompt": ASKED, "completion": [*ASKED, GOLD]}, r"line 1: field completion is \[.*; it must be one turn of the assistant"),
        ({"text": "one", "response": "two"}, r"line 1 has text and response, and no prompt; name the text prompt, or take response"),
        ({"messages": [{"role": "user", "content": None}]}, r'a turn of messages is {"role": "user", "content": null}; it needs role and'),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}, r'has the part {"type": "image", "url": "x"}; only text'),
        ({"messages": ASKED, "tools": "search"}, r"line 1: field tools is \"search\"; it must be a list of tools, or JSON of one"),
        ({"prompt": "one", "response": "two", "prompt_ids": "1", "response_ids": [2]}, r'field prompt_ids is "1"; it must be a list of token'),
    ],
)  # fmt: skip
def test_a_row_of_two_meanings_is_refused(tmp_path, tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        learnt(tmp_path, tokenizer, {"prompt": "one", "response": "two"} | row if "prompt_ids" in row else row)


def test_contents_in_parts_of_text_are_joined(tmp_path, tokenizer):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert learnt(tmp_path, tokenizer, {"messages": [{"role": "user", "content": parts}, GOLD]}) == [
        ("<user>one two\n<assistant>", "GOLD")
    ]


# ---- what generate.py writes

FORMS = {
    "prompt, response": {"prompt": "one\n", "response": "GOLD"},
    "prompt alone": {"prompt": "one\n"},
    "prompt, output": {"prompt": "one\n", "output": "GOLD"},
    "prompt, several outputs": {"prompt": "one\n", "output": ["GOLD", "GOLD GOLD"]},
    "instruction, input, output": {"instruction": "one", "input": "two", "output": "GOLD"},
    "prompt beside its instruction": {"instruction": "one", "prompt": render_prompt("one"), "output": "GOLD"},
    "question, answer": {"question": "one", "answer": "GOLD"},
    "chat with its answer": {"messages": [*ASKED, GOLD]},
    "chat without an answer": {"messages": ASKED},
    "chat beside its prompt": {"prompt": "two", "messages": [*ASKED, GOLD]},
    "turns, completion": {"prompt": ASKED, "completion": [GOLD]},
    "with a reference": {"prompt": "one\n", "response": "four", "reference": "GOLD"},
    "generated already": {"prompt": "one\n", "response": "GOLD", "finish_reason": "length", "prompt_ids": [1], "response_ids": [2]},
}


def ends(tokenizer):
    return EndIds((tokenizer.eos_token_id,), tokenizer.eos_token_id)


def generated(tmp_path, tokenizer, row, response, *, token_ids):
    """The ids of the prompt, and the file that is written for them and this response."""
    settings = ResponseConfig(max_prompt_length=256)
    prompts = Prompts(str(written(tmp_path / "asked.jsonl", row)), tokenizer, ends(tokenizer), settings)
    answered = prompts.row(0, response, token_ids=token_ids)
    assert set(row) - {"response", "output", "answer", "completion", "prompt_ids", "response_ids"} <= set(answered)
    return prompts[0].prompt, written(tmp_path / "answered.jsonl", answered)


@pytest.mark.parametrize("token_ids", [False, True])
@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_what_is_generated_is_what_is_learnt(tmp_path, tokenizer, noted, name, ended, token_ids):
    response = tokenizer(" three four")["input_ids"] + [tokenizer.eos_token_id] * ended
    row = dict(FORMS[name])
    if "prompt_ids" in row:
        row["prompt_ids"], row["response_ids"] = tokenizer("one\n")["input_ids"], tokenizer("GOLD")["input_ids"]
    prompt, path = generated(tmp_path, tokenizer, row, response, token_ids=token_ids)
    noted.clear()
    (sample,) = SFTDataset(path, tokenizer)
    assert (sample.prompt, sample.response) == (prompt, tuple(response))
    if "prompt" not in row or "messages" not in row:
        assert not noted.messages, "what generate.py writes needs no word of explanation"
    said = json.loads(path.read_text())
    old = {"prompt, several outputs": ["GOLD", "GOLD GOLD"], "prompt alone": None, "chat without an answer": None}
    old["turns, completion"] = [GOLD]
    assert said.get("reference") == old.get(name, "GOLD")
    again, path = generated(tmp_path, tokenizer, said, response, token_ids=token_ids)  # a second teacher answers the first's file
    assert (again, SFTDataset(path, tokenizer)[0].response) == (prompt, tuple(response))
    assert json.loads(path.read_text()) == {"reference": said["response"]} | said


def test_ids_that_the_tokenizer_would_not_write_are_learnt_as_they_were_sampled(tmp_path, tokenizer):
    response = [i for letter in " three" for i in tokenizer(letter)["input_ids"]]
    assert response != tokenizer(" three")["input_ids"]
    _, path = generated(tmp_path, tokenizer, {"prompt": "one"}, response, token_ids=True)
    assert SFTDataset(path, tokenizer)[0].response == tuple(response)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": " four"}, r"line 1: response_ids do not spell its response with this tokenizer; take prompt_ids and response_ids out"),
        ({"prompt": "two"}, r"line 1: prompt_ids are not those of its prompt with this tokenizer and --prompt-template; take"),
        ({"response_ids": [10**6]}, r"line 1: response_ids do not spell its response"),
    ],
)  # fmt: skip
def test_ids_that_are_not_the_rows_text_are_refused(tmp_path, tokenizer, change, message):
    response = tokenizer(" three")["input_ids"]
    _, path = generated(tmp_path, tokenizer, {"prompt": "one"}, response, token_ids=True)
    written(path, json.loads(path.read_text()) | change)
    with pytest.raises(ValueError, match=message):
        SFTDataset(path, tokenizer)


def test_plain_text_is_no_prompt_to_answer(tmp_path, tokenizer):
    for row in ({"text": "one two three"}, {"prompt": "", "response": "one two three"}):
        with pytest.raises(ValueError, match=r"line 1 is plain text; --data needs rows with prompt, or with instruction and"):
            Prompts(str(written(tmp_path / "text.jsonl", row)), tokenizer, ends(tokenizer), ResponseConfig())


# ---- prompts


def test_prompts_of_a_chat_beside_its_prompt_have_every_turn(tmp_path, tokenizer, noted):
    data = PromptDataset(written(tmp_path / "ultra.jsonl", {"prompt": "two", "messages": [*ASKED, GOLD, ASKED[1]]}), tokenizer)
    assert data.prompt_text(0) == tokenizer.decode(data[0].prompt) == "<system>one\n<user>two\n<assistant>GOLD\n<user>two\n<assistant>"


def test_rows_are_made_again_as_they_were_read(tmp_path, tokenizer):
    rows = [{"prompt": "one", "output": ["two", "drei ü 😀\u2028"]}, {"messages": [*ASKED, GOLD]}, {"text": "four"}]
    read = read_rows(written(tmp_path / "data.jsonl", *rows), tokenizer)
    assert [(row.prompt, row.references) for row in read] == [
        ("one", ("two", "drei ü 😀\u2028")),
        (RENDERED, ("GOLD",)),
        ("", ("four",)),
    ]
    assert [read.fields(i) for i in range(3)] == rows and read[-1].where == read.where(2) == f"{tmp_path / 'data.jsonl'} line 3"
