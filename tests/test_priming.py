"""What the teacher reads where the student reads a prompt: which words, from which row and template, how long, and what is told of it."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
from train_tokenizer import train_tokenizer

from megakd.config import ConditioningConfig, Config, DataConfig, parse
from megakd.data.conditioning import Conditioning
from megakd.data.open_data import open_prompts, open_responses
from megakd.data.priming import NAMED
from megakd.data.shown import as_read
from megakd.data.templates import render_prompt
from megakd.errors import UserError

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
OTHER_CHAT = CHAT.replace("<", "[").replace(">", "]")
SYSTEM, USER, ANSWER = ({"role": role, "content": text} for role, text in (("system", "one"), ("user", "two"), ("assistant", "GOLD")))


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["one two three four five six user assistant system GOLD answer As a teacher"] * 4, vocab_size=320)
    tokenizer.chat_template = CHAT
    return tokenizer


def opened(tmp_path, tokenizer, *rows, teacher=None, positions=1000, new_tokens=0, prompts=False, data=None, **flags):
    """The samples of a file with these rows, as the run's data are opened."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = data or DataConfig()
    options = {"template": data.prompt_template, "positions": positions, "new_tokens": new_tokens}
    conditioning = Conditioning.open(ConditioningConfig(**flags), tokenizer, teacher or tokenizer, **options)
    return (open_prompts if prompts else open_responses)(str(path), tokenizer, data, conditioning=conditioning)


def taught(tmp_path, tokenizer, row, **options) -> str | None:
    """What the teacher reads before the response; None where it is what the student reads."""
    (sample,) = opened(tmp_path, tokenizer, row, **options)
    (bare,) = opened(tmp_path, tokenizer, row, prompts=options.get("prompts", False), data=options.get("data"))
    assert (sample.prompt, sample.response) == (bare.prompt, bare.response), "the student reads what it always did"
    return sample.teacher_prompt and tokenizer.decode(sample.teacher_prompt)


PROMPT = {"prompt": "one two", "response": "three"}
TASK = {"instruction": "one", "input": "two", "output": "three"}
TEACHER, CONFIDENCE = NAMED["teacher"][0], NAMED["confidence"][1]


def test_the_papers_texts_are_the_papers():
    """To the letter: each before the question ends in one space, and confidence comes after it."""
    assert TEACHER == (
        "As a teacher, guide your student through solving the question below. Provide a clear, simple explanation for someone "
        "unfamiliar with the problem. "
    )
    assert NAMED["ground-truth"][0] == (
        "As a smart language model, provide a detailed answer that is clear and feasible for smaller models to understand and learn "
        "from without losing too much detail. "
    )
    assert NAMED["confidence"] == ("", " Briefly double-check that your answer is correct once done.")
    assert NAMED["none"] == ("", "") and list(NAMED) == ["none", "teacher", "ground-truth", "confidence"]


WRITTEN = {  # row, flags: what the teacher reads
    "a prompt": (PROMPT, {"teacher_priming": "teacher"}, TEACHER + "one two"),
    "an underscore": (PROMPT, {"teacher_priming": "Ground_Truth"}, NAMED["ground-truth"][0] + "one two"),
    "after the question": (PROMPT, {"teacher_priming": "confidence"}, "one two" + CONFIDENCE),
    "a text of one's own": (PROMPT, {"teacher_priming": "Think of three."}, "Think of three. one two"),
    "a text that ends in a line of its own": (PROMPT, {"teacher_priming": "Think.\n"}, "Think.\none two"),
    "an instruction": (TASK, {"teacher_priming": "confidence"}, render_prompt("one" + CONFIDENCE, "two")),
    "a question": ({"question": "one", "answer": "three"}, {"teacher_priming": "teacher"}, render_prompt(TEACHER + "one")),
    "the last turn of the user": (
        {"messages": [SYSTEM, USER, ANSWER, USER, ANSWER]},
        {"teacher_priming": "Think."},
        "<system>one\n<user>two\n<assistant>GOLD\n<user>Think. two\n<assistant>",
    ),
    "turns as prompt": ({"prompt": [USER], "completion": [ANSWER]}, {"teacher_priming": "Think."}, "<user>Think. two\n<assistant>"),
    "contents in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}, ANSWER]},
        {"teacher_priming": "Think."},
        "<user>Think. one two\n<assistant>",
    ),
    "a field of the row": (PROMPT | {"hint": "four"}, {"teacher_prompt_field": "hint"}, "four\n\none two"),
    "the right answer": (PROMPT, {"teacher_prompt_field": "response"}, "three\n\none two"),
    "the first of several": (PROMPT | {"hint": ["four", "five"]}, {"teacher_prompt_field": "hint"}, "four\n\none two"),
    "a field behind a priming": (
        PROMPT | {"hint": "four"},
        {"teacher_prompt_field": "hint", "teacher_priming": "Think."},
        "Think. four\n\none two",
    ),
    "an empty field": (PROMPT | {"hint": ""}, {"teacher_prompt_field": "hint"}, None),
    "nothing": (PROMPT, {"teacher_priming": ""}, None),
    "none": (PROMPT, {"teacher_priming": "none"}, None),
    "plain text": ({"text": "one two three"}, {"teacher_priming": "teacher"}, None),
}


@pytest.mark.parametrize("prompts", [False, True], ids=["responses", "prompts"])
@pytest.mark.parametrize("name", WRITTEN)
def test_the_teacher_reads_the_question_with_what_is_for_it(tmp_path, tokenizer, name, prompts):
    row, flags, wanted = WRITTEN[name]
    assert taught(tmp_path, tokenizer, row, prompts=prompts, **flags) == wanted


def test_a_template_says_what_stands_where(tmp_path, tokenizer):
    file = tmp_path / "hint.jinja"
    file.write_text("{{ question }} {{ field }}{% if row.second %} {{ row.second }}{% endif %}!\n")
    flags = {"teacher_priming": str(file), "teacher_prompt_field": "hint"}
    assert taught(tmp_path, tokenizer, TASK | {"hint": "four", "second": "six"}, **flags) == render_prompt("one four six!\n", "two")


def test_the_teachers_own_chat_template_writes_what_it_reads(tmp_path, tokenizer, noted):
    teacher, bare = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    teacher.chat_template, bare.chat_template = OTHER_CHAT, None
    row = {"messages": [SYSTEM, USER, ANSWER]}
    assert taught(tmp_path, tokenizer, row, teacher=teacher) == "[system]one\n[user]two\n[assistant]"
    assert taught(tmp_path, tokenizer, row, teacher=teacher, teacher_priming="Think.") == "[system]one\n[user]Think. two\n[assistant]"
    assert taught(tmp_path, tokenizer, row, teacher=bare, teacher_priming="Think.") == "<system>one\n<user>Think. two\n<assistant>"
    assert set(noted.messages) == {"student and teacher have unlike chat templates: each reads a chat as its own writes it"}
    assert taught(tmp_path, tokenizer, PROMPT, teacher=teacher) is None, "a prompt that is no chat is read as it stands"


def test_where_both_read_the_same_there_is_nothing_to_ask_of_a_row(tokenizer):
    options = {"template": "alpaca", "positions": 10}
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    for teacher in (tokenizer, bare):
        assert Conditioning.open(ConditioningConfig(), tokenizer, teacher, **options) is None


# ---- lengths


def test_rows_whose_teacher_prompt_is_too_long_are_left_out_and_told(tmp_path, tokenizer, noted):
    rows = [PROMPT, PROMPT | {"hint": "four " * 30}, PROMPT | {"hint": "five"}]
    rows[0] = PROMPT | {"hint": ""}
    flags = {"teacher_prompt_field": "hint", "teacher_max_prompt_length": 12}
    for prompts in (False, True):
        data = opened(tmp_path, tokenizer, *rows, prompts=prompts, **flags)
        assert [data.where(i)[-1] for i in range(len(data))] == ["1", "3"]
        assert [sample.sample_id for sample in data] == [0, 1]
    line = f"{tmp_path / 'data.jsonl'}: left out 1 of 3 rows, teacher prompt longer than 12 tokens"
    assert noted.messages == [line, line]
    with pytest.raises(UserError, match=r"all 1 teacher prompts are longer than --teacher-max-prompt-length 12 tokens; the shortest has"):
        opened(tmp_path, tokenizer, rows[1], **flags)


def test_a_row_for_which_the_teacher_has_no_positions_names_the_flag_that_leaves_it_out(tmp_path, tokenizer):
    """The response that is there counts as it will be learnt, and one that is yet to be written as long as it may become."""
    (sample,) = opened(tmp_path, tokenizer, PROMPT, teacher_priming="Think of it.")
    prompt, response = len(sample.teacher_prompt), len(sample.response)
    for new_tokens, longest in ((0, response), (response + 7, response + 7)):
        options = {"teacher_priming": "Think of it.", "new_tokens": new_tokens}
        opened(tmp_path, tokenizer, PROMPT, positions=prompt + longest, **options)
        with pytest.raises(UserError) as refused:
            opened(tmp_path, tokenizer, PROMPT, positions=prompt + longest - 1, **options)
        assert str(refused.value) == (
            f"{tmp_path / 'data.jsonl'} line 1: the teacher's prompt of {prompt} tokens and a response of {longest} are more than the "
            f"{prompt + longest - 1} positions that it has for both; leave such rows out with --teacher-max-prompt-length {prompt - 1}"
        )
    cut = DataConfig(max_length=len(sample.prompt) + 1, max_prompt_length=len(sample.prompt))
    opened(tmp_path, tokenizer, PROMPT, teacher_priming="Think of it.", positions=prompt + 1, data=cut)


# ---- mistakes and what is told


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        (PROMPT, {"teacher_prompt_field": "hint"}, "line 1: has no field hint; --teacher-prompt-field names a text that every row has"),
        (PROMPT | {"hint": 5}, {"teacher_prompt_field": "hint"}, "line 1: field hint is 5; --teacher-prompt-field names a text that every row has"),
        ({"messages": [SYSTEM, ANSWER]}, {"teacher_priming": "teacher"}, "line 1: messages has no turn of the user, whose question is primed"),
        (PROMPT, {"teacher_priming": "gone.jinja"}, "--teacher-priming gone.jinja: no such file; give none, teacher, ground-truth, confidence, a text or"),
    ],
)  # fmt: skip
def test_a_row_or_file_that_cannot_be_primed_is_named(tmp_path, tokenizer, row, flags, message):
    with pytest.raises(UserError, match=re.escape(message)):
        opened(tmp_path, tokenizer, row, **flags)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ prompt }}", "'prompt' is undefined; its fields are question, field and row"),
        ("{{ question", "line 1: unexpected end of template"),
        ("{{ row.hint }}", "'dict object' has no attribute 'hint'; its fields are question, field and row"),
        ("{% if field %}{{ question }}{% endif %}", "line 1: --teacher-priming leaves the teacher nothing to read"),
    ],
)
def test_a_template_that_cannot_prime_is_named(tmp_path, tokenizer, template, message):
    file = tmp_path / "bad.jinja"
    file.write_text(template)
    with pytest.raises(UserError, match=re.escape(message)):
        opened(tmp_path, tokenizer, {"prompt": "one", "response": "two"}, teacher_priming=str(file))


def test_token_ids_have_no_question_to_prime(tmp_path, tokenizer):
    conditioning = Conditioning.open(ConditioningConfig(teacher_priming="teacher"), tokenizer, tokenizer, template="plain", positions=9)
    with pytest.raises(UserError, match=r"train_0.bin holds token ids, and --teacher-priming needs text; give the .jsonl they were made"):
        open_responses(str(tmp_path / "train_0.bin"), tokenizer, DataConfig(), conditioning=conditioning)


def test_plain_text_is_told_to_be_read_alike(tmp_path, tokenizer, noted):
    opened(tmp_path, tokenizer, *[{"text": "one two three"}] * 3, teacher_priming="teacher")
    assert noted.messages == [
        f"{tmp_path / 'data.jsonl'} line 1 and 2 more rows: is plain text and asks nothing; the teacher reads it as the student does"
    ]


FLAGS = "--method kd --model m --teacher-model t --train-data d --save s --train-iters 1"


def test_a_misspelled_name_is_no_text(capsys):
    with pytest.raises(SystemExit):
        parse([*FLAGS.split(), "--teacher-priming", "techer"])
    assert "error: --teacher-priming techer: did you mean teacher?" in capsys.readouterr().err
    for text in ("Teach well.", "hint.jinja", "ground_truth", ""):
        parse([*FLAGS.split(), "--teacher-priming", text])


def test_a_method_without_a_teacher_has_none_to_prime(capsys):
    with pytest.raises(SystemExit):
        parse(["--method", "sft", "--model", "m", "--train-data", "d", "--save", "s", "--train-iters", "1", "--teacher-priming", "teacher"])
    assert "--method sft has no use for --teacher-priming teacher" in capsys.readouterr().err


# ---- a row as it is read


def test_a_row_is_shown_as_both_read_it_with_the_loss_marked(tmp_path, tokenizer):
    (sample,) = opened(tmp_path, tokenizer, {"prompt": "one\ntwo", "response": " three"}, teacher_priming="Think.")
    options = {"where": "train.jsonl line 1", "written": "what the student writes", "has_teacher": True}
    x, y, z = len(sample.prompt), len(sample.response), len(sample.teacher_prompt)
    marked = f"⟦ three{tokenizer.eos_token}⟧"
    assert as_read(sample, tokenizer, **options).splitlines() == [
        "train.jsonl line 1, the loss is on ⟦this⟧",
        f"the student reads {x} + {y} tokens:", "    | one", f"    | two{marked}",
        f"the teacher reads {z} + {y} tokens:", "    | Think. one", f"    | two{marked}",
    ]  # fmt: skip
    asked = as_read(replace(sample, response=()), tokenizer, **options).splitlines()
    assert asked[1:4] == [f"the student reads {x} tokens:", "    | one", "    | two⟦what the student writes⟧"]
    same = as_read(replace(sample, teacher_prompt=None), tokenizer, **options).splitlines()
    assert same[-1] == "the teacher reads the same"
    assert "teacher" not in as_read(sample, tokenizer, **options | {"has_teacher": False})
    assert Config().output.show_data == 0


def test_a_limit_of_the_teachers_prompt_without_one_is_told(tokenizer, noted):
    assert Conditioning.open(ConditioningConfig(teacher_max_prompt_length=3), tokenizer, tokenizer, template="plain", positions=9) is None
    assert noted.messages == ["--teacher-max-prompt-length has no effect: the teacher reads what the student does; --max-prompt-length limits both"]
