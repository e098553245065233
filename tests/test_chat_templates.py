"""What is learnt of a chat is what its template writes for the whole of it; where that cannot be, the difference is told."""

import json
import re

import pytest
from train_tokenizer import train_tokenizer
from transformers import PreTrainedTokenizerFast

from megakd.data.prompt_dataset import PromptDataset
from megakd.data.sft_dataset import SFTDataset
from megakd.data.templates import open_template
from megakd.data.tokenizer import load_tokenizer


def chatml(before="", after=""):
    """`before` an answer in the whole chat, and `after` the assistant's header in a prompt."""
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + before + "{{ m.content }}<|im_end|>\n{% endfor %}"
    return turns + "{% if add_generation_prompt %}<|im_start|>assistant\n" + after + "{% endif %}"


THINKING = "<think>\n\n</think>\n\n"
CALL = "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
TEMPLATES = {  # the sign that ends a turn, and a template of the shape of that model's
    "llama-3": ("<|eot_id|>", "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"),
    "mistral": ("</s>", "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"),
    "qwen-3": ("<|im_end|>", chatml("{% if m.role == 'assistant' and loop.last %}" + THINKING + "{% endif %}")),
    "zephyr": ("</s>", "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"),
    "calls": ("<|im_end|>", "{% if tools %}{{ tools | tojson }}{% endif %}" + chatml(CALL)),
    "no header": ("</s>", "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"),
    "thinking in prompts only": ("<|im_end|>", chatml(after=THINKING)),
    "no end": ("</s>", "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"),
    "another end": ("</s>", chatml()),
}  # fmt: skip
ONE, TWO = {"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALLING = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": {}}}]}


@pytest.fixture(scope="module")
def trained():
    tokenizer = train_tokenizer(["user assistant system One Two [INST] think"] * 4, vocab_size=300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "</s>"]})
    return tokenizer


def using(tokenizer, name):
    tokenizer.eos_token, tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["llama-3", "mistral", "qwen-3", "zephyr", "calls", "no header"])
@pytest.mark.parametrize(
    "turns",
    [
        [ONE, TWO],
        [{"role": "system", "content": "Two"}, ONE, TWO, ONE, {"role": "assistant", "content": "One\n\nTwo"}],
        [ONE, {"role": "assistant", "content": "Two Two"}, ONE, TWO],
    ],
)
def test_the_ids_of_a_chat_are_those_of_the_whole_in_its_template(tmp_path, trained, noted, name, turns):
    tokenizer = using(trained, name)
    (sample,) = SFTDataset(written(tmp_path / "chat.jsonl", {"messages": turns}), tokenizer)
    whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    assert tokenizer.decode(sample.prompt + sample.response) == whole
    assert list(sample.prompt + sample.response) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    asked = PromptDataset(written(tmp_path / "asked.jsonl", {"messages": turns[:-1]}), tokenizer)
    assert asked[0].prompt == sample.prompt
    assert all("<assistant> is put after the prompt" in line for line in noted.messages)
    assert bool(noted.messages) == (name == "no header")


@pytest.mark.parametrize(
    ("name", "response"), [("mistral", " Two</s>"), ("qwen-3", THINKING + "Two<|im_end|>"), ("llama-3", "Two<|eot_id|>")]
)
def test_the_response_begins_where_the_template_begins_it(tmp_path, trained, name, response):
    tokenizer = using(trained, name)
    data = SFTDataset(written(tmp_path / "chat.jsonl", {"messages": [ONE, TWO]}), tokenizer)
    assert (tokenizer.decode(data[0].response), data.references(0)) == (response, ("Two",))


TOLD = {  # template, row: what is told
    "a thinking block that only prompts have": ("thinking in prompts only", {"messages": [ONE, TWO]}, r"from character \d+ the template has .*'.*assistant\\nTwo<\|im_end\|>', and learnt is .*'.*assistant\\n<think>\\n\\n</think>\\n\\nTwo"),
    "another end": ("another end", {"messages": [ONE, TWO]}, r"the template has .*'.*Two<\|im_end\|>', and learnt is .*'.*Two</s>'$"),
    "a space that is not there": ("mistral", {"messages": [ONE], "response": "Two"}, r"the template has .*'\[INST\] One \[/INST\] Two</s>', and learnt is .*'\[INST\] One \[/INST\]Two</s>'$"),
    "tools without a place": ("zephyr", {"messages": [ONE, TWO], "tools": TOOLS}, r"has tools, for which the chat template has no place; they are not in the prompt$"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_what_differs_from_the_template_is_told_once_with_both_texts(tmp_path, trained, noted, case):
    name, row, told = TOLD[case]
    path = written(tmp_path / "chat.jsonl", row, row)
    SFTDataset(path, using(trained, name))
    (line,) = noted.messages
    assert line.startswith(f"{path} line 1 and 1 more row: ") and len(line) < len(str(path)) + 300
    assert re.search(told, line), line


def test_a_template_without_an_end_differs_in_nothing_that_is_learnt(tmp_path, trained, noted):
    tokenizer = using(trained, "no end")
    (sample,) = SFTDataset(written(tmp_path / "chat.jsonl", {"messages": [ONE, TWO]}), tokenizer)
    assert tokenizer.decode(sample.prompt + sample.response) == "<user>One\n<assistant>Two</s>" and not noted.messages


def test_a_template_writes_the_tokenizers_own_end_whichever_is_taught(tmp_path, trained, noted):
    """Of `generate`'s end, which is taught, the turns before know nothing."""
    using(trained, "zephyr").save_pretrained(tmp_path)
    taught = trained.convert_tokens_to_ids("<|im_end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": taught}))
    turns = [ONE, TWO, ONE, TWO]
    (sample,) = SFTDataset(written(tmp_path / "chat.jsonl", {"messages": turns}), load_tokenizer(tmp_path))
    asked = PreTrainedTokenizerFast.from_pretrained(tmp_path).apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert trained.decode(sample.prompt) == asked and asked.count("</s>") == 3
    assert trained.decode(sample.response) == "Two<|im_end|>"
    assert re.search(r"the template has .*'.*Two</s>', and learnt is .*'.*Two<\|im_end\|>'$", noted.messages[0])


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_an_answer_that_calls_a_tool_is_learnt_as_the_template_writes_it(tmp_path, trained, noted, tools):
    tokenizer = using(trained, "calls")
    data = SFTDataset(written(tmp_path / "chat.jsonl", {"messages": [ONE, CALLING], "tools": tools}), tokenizer)
    call = '<tool_call>{"arguments": {}, "name": "clock"}</tool_call>'
    assert json.loads(call[11:-12]) == json.loads(tokenizer.decode(data[0].response)[11:-22])
    whole = tokenizer.apply_chat_template([ONE, {**CALLING, "content": ""}], tools=TOOLS, tokenize=False)
    assert tokenizer.decode(data[0].prompt + data[0].response) == whole.rstrip("\n") and "clock" in data.prompt_text(0)
    assert data.references(0)[0].startswith("<tool_call>") and not noted.messages


def test_a_tool_call_that_no_template_can_write_is_refused(tmp_path, trained):
    path = written(tmp_path / "chat.jsonl", {"messages": [ONE, CALLING]})
    with pytest.raises(ValueError, match=r"chat.jsonl line 1: the answer calls a tool, and the chat template writes the turns before"):
        SFTDataset(path, using(trained, "thinking in prompts only"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", r"chat.jsonl line 2: the chat template fails on these messages \(TypeError: .*\); change them"),
        ("{{ 1 // 0 }}", r"line 2: the chat template fails on these messages \(ZeroDivisionError: .*\); change"),
        ("{{ nobody.name }}", r"line 2: the chat template refuses these messages \('nobody' is undefined\); change"),
    ],
)
def test_whatever_a_template_raises_is_one_line(tmp_path, trained, template, message):
    trained.chat_template = template
    with pytest.raises(ValueError, match=message) as caught:
        SFTDataset(written(tmp_path / "chat.jsonl", {"prompt": "One", "response": "Two"}, {"messages": [ONE, TWO]}), trained)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_of_a_template_is_in_no_prompt(tmp_path, trained):
    tokenizer = using(trained, "zephyr")
    tokenizer.chat_template = "\ufeff" + tokenizer.chat_template
    data = PromptDataset(written(tmp_path / "chat.jsonl", {"messages": [ONE]}), tokenizer)
    assert data.prompt_text(0).startswith("<|user|>")
    (tmp_path / "own.jinja").write_text("\ufeffQ: {{ instruction }}", encoding="utf-8")
    assert open_template(str(tmp_path / "own.jinja"))("One", "") == "Q: One"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9 {{ instruction }}", r"--prompt-template .*own.jinja: byte 3 is not UTF-8; convert the file to UTF-8"),
        (b"{{ instruction + 1 }}", r"--prompt-template .*own.jinja: TypeError: .*; its fields are instruction and input"),
    ],
)
def test_a_prompt_template_that_fails_is_one_line(tmp_path, content, message):
    (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_template(str(tmp_path / "own.jinja"))


def test_a_prompt_template_that_fails_on_a_row_names_the_row(tmp_path, trained):
    (tmp_path / "own.jinja").write_text("{{ 1 // (instruction | length - 3) }}")
    path = written(tmp_path / "data.jsonl", {"instruction": "four", "output": "a"}, {"instruction": "One", "output": "b"})
    with pytest.raises(ValueError, match=r"data.jsonl line 2: --prompt-template .*own.jinja: ZeroDivisionError"):
        SFTDataset(path, trained, template=str(tmp_path / "own.jinja"))


# ---- ids and text


def test_ids_that_are_not_the_text_are_told_once_for_a_data_set(tmp_path, noted):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "One": 1, "Two": 2, "</s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    path = written(tmp_path / "data.jsonl", {"prompt": "One ", "response": "Two"}, *[{"prompt": "One ", "response": "Drei"}] * 3)
    SFTDataset(path, tokenizer)
    assert noted.messages == [f"{path} line 2: from character 5 the text has 'One Drei', and its token ids say 'One <unk>'"]


def test_the_space_that_a_sentence_piece_tokenizer_adds_is_told_where_a_row_is_encoded_apart(tmp_path, data_folder, noted):
    from megakd.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(data_folder / "models" / "stories260K")
    SFTDataset(written(tmp_path / "fine.jsonl", {"prompt": "Once upon", "response": " a time"}), tokenizer)
    assert not noted.messages
    path = written(tmp_path / "apart.jsonl", {"prompt": "Once upon a t", "response": "he"})
    data = SFTDataset(path, tokenizer)
    told = [line for line in noted.messages if "its token ids say" in line]
    assert bool(told) == (tokenizer.decode(data[0].prompt + data[0].response[:-1]) != "Once upon a the")
