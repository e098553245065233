"""From a record to a row of text: a prompt, and its right responses. Here it is decided which fields are read.

What is asked is the first of these that a record has:

    messages                           a chat: the assistant's last turn is the response, the tokenizer renders the others
    prompt                             as it is (MiniLLM's files: rendered already); or a list of turns, as in messages
    instruction, input                 rendered with --prompt-template; input may be missing or ""
    question                           GSM8K's files: the question is the instruction
    text                               plain text: no prompt, every token is learnt

What is right is the first of `response`, `completion`, `output`, `answer`: one text or a list of right ones, which follows the
prompt as it stands; or, after a list of turns, a list with the assistant's turn. It may be missing where only prompts are wanted.
A field that is passed over and does not say the same is told, once for a file, and so is a context that the prompt lacks. Two
different answers of a chat are refused.

    finish_reason "length"             the response was cut off: no EOS follows it
    prompt_ids, response_ids           what `generate.py --token-ids` wrote: learnt as they stand, and have to fit prompt and response
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from megakd.data.chat import Chat, check_turns, difference
from megakd.data.notes import Notes
from megakd.data.tokenizer import eos_id
from megakd.data.values import FORMS, short, shown
from megakd.errors import UserError

QUESTIONS = ("messages", "prompt", "instruction", "question", "text")
ANSWERS = ("response", "completion", "output", "answer")
PARTS = ("input", "context", "system", "system_prompt")  # of a question, in people's files; only an instruction's input is read
GENERATED = ("finish_reason", "prompt_ids", "response_ids")


@dataclass(frozen=True)
class Row:
    """One row of a data file."""

    where: str  # "train.jsonl line 7", for messages
    prompt: str  # "" for plain text
    references: tuple[str, ...]  # right responses; none in a file of prompts
    response: str | None  # what is learnt after the prompt, to the byte; None in a file of prompts
    ends: bool = True  # EOS follows the response
    ids: tuple[list[int], list[int]] | None = None  # of prompt and response, where the record has them
    teacher_prompt: str | None = None  # what the teacher reads in the prompt's place, where that is something else

    @property
    def is_text(self) -> bool:
        """Plain text, or a response to nothing."""
        return not self.prompt and self.response is not None


@dataclass(frozen=True)
class RowReader:
    """What makes rows of records; `notes` are what it has to tell."""

    render: Callable[[str, str], str]  # --prompt-template
    tokenizer: PreTrainedTokenizerBase | None
    notes: Notes = field(default_factory=Notes)

    def row_of(self, fields: dict, where: str) -> Row:
        """Raises UserError where a record has none of the forms above, or a value is no text."""
        asked = [name for name in QUESTIONS if name in fields]
        if not asked:
            raise UserError(f"{where} has the fields {short(', '.join(fields))}; it needs {FORMS}")
        if is_chat(fields, asked[0]):
            row = self._chat(fields, asked[0], where)
        elif asked[0] == "text":
            row = plain_text(fields, where)
        else:
            right = references(fields, where)
            row = Row(where, self._prompt(fields, asked[0], where), right, next(iter(right), None))
        self._note_unread(fields, asked, row)
        return with_generated(row, fields)

    def prompt_of(self, fields: dict, where: str) -> str:
        """The prompt alone of a record that has one."""
        name = asked_first(fields)
        if is_chat(fields, name):
            return self._opening(Chat(check_turns(fields[name], name, where), tools_of(fields, where), self.tokenizer, where))
        return self._prompt(fields, name, where)

    def _prompt(self, fields: dict, name: str, where: str) -> str:
        """The text that the model is asked to continue."""
        if name == "prompt":
            return string(fields, name, where)
        instruction, input = string(fields, name, where), string(fields, "input", where) if name == "instruction" else ""
        try:
            return self.render(instruction, input)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error

    def _note_unread(self, fields: dict, asked: list[str], row: Row) -> None:
        """Tell of a second question or answer that does not say the same as the first, and of a part that the prompt lacks."""
        for name in asked[1:]:
            if not self._says_the_same(name, fields, row):
                self.notes.add(f"has {asked[0]} and {name}; {asked[0]} is read, {name} is not", row.where)
        answers = [name for name in ANSWERS if name in fields]
        for name in answers[1:]:
            if as_list(fields[name]) != as_list(fields[answers[0]]):
                self.notes.add(f"has {answers[0]} and {name}; {answers[0]} is read, {name} is not", row.where)

        for name in PARTS:
            part = fields.get(name)
            if isinstance(part, str) and part.strip() not in row.prompt and not row.is_text:
                way_out = "call it input" if asked[0] == "instruction" and name != "input" else f"put it into {asked[0]}"
                self.notes.add(f"has {name}, which is not in the prompt; {way_out} if it should be", row.where)

    def _says_the_same(self, name: str, fields: dict, row: Row) -> bool:
        """An instruction that is rendered in the prompt, or a text of prompt and response, as published files have them."""
        if name in ("instruction", "question"):
            return self._prompt(fields, name, row.where) == row.prompt
        return name == "text" and fields[name] == row.prompt + (row.response or "")

    # ---- chats

    def _chat(self, fields: dict, name: str, where: str) -> Row:
        turns, given = check_turns(fields[name], name, where), ()
        if answer := turn_of_answer(fields, where):
            turns, given = ([*turns, answer], ()) if turns[-1]["role"] != "assistant" else (turns, (answer["content"],))
        else:
            given = references(fields, where)
        chat = Chat(turns, tools_of(fields, where), self.tokenizer, where)
        if chat.ignores_tools():
            self.notes.add("has tools, for which the chat template has no place; they are not in the prompt", where)
        if chat.is_answered:
            return self._answered(chat, given)
        prompt = self._opening(chat)
        if given and "finish_reason" not in fields:  # what a model wrote is learnt as it wrote it
            self._compare(prompt + given[0].rstrip(), chat.with_answer(given[0].strip()), where)
        return Row(where, prompt, given, next(iter(given), None))

    def _answered(self, chat: Chat, given: Sequence[str]) -> Row:
        """The answer is the last turn; another field may only say the same."""
        content = chat.turns[-1]["content"]
        if given and given[0].strip() != content.strip():
            raise UserError(
                f"{chat.where} has two answers: messages end with {short(content)}, and another field says {short(given[0])}; "
                "take one of them out"
            )
        prompt, whole = self._opening(chat), chat.whole()
        response = chat.response(prompt, whole)
        self._compare(prompt + response, whole, chat.where)
        return Row(chat.where, prompt, (content or response.strip(),), response)

    def _opening(self, chat: Chat) -> str:
        """The prompt, with what the template forgets."""
        prompt = chat.prompt()
        if header := chat.header(prompt):
            self.notes.add(f"the chat template knows no add_generation_prompt; {short(header)} is put after the prompt", chat.where)
        return prompt + header

    def _compare(self, learnt: str, whole: str, where: str) -> None:
        """Tell where the template writes a whole chat otherwise."""
        end = self.tokenizer.convert_ids_to_tokens(eos_id(self.tokenizer))
        if differs := difference(learnt, whole, end):
            self.notes.add("what is learnt is not what the chat template writes for the whole chat", where, f": {differs}")


def asked_first(fields: dict) -> str:
    """The field that asks, of a record that has one."""
    return next(name for name in QUESTIONS if name in fields)


def is_chat(fields: dict, name: str) -> bool:
    """Whether what asks is a list of turns."""
    return name == "messages" or isinstance(fields[name], list)


def plain_text(fields: dict, where: str) -> Row:
    """Every token is learnt. Raises UserError where it has a response, which would have to follow something."""
    answers = [name for name in ANSWERS if name in fields]
    if answers:
        raise UserError(f"{where} has text and {answers[0]}, and no prompt; name the text prompt, or take {answers[0]} out")
    text = string(fields, "text", where)
    return Row(where, "", (text,), text)


def with_generated(row: Row, fields: dict) -> Row:
    """What `generate.py` knows of its response beside its text."""
    ids = tuple(fields[name] for name in ("prompt_ids", "response_ids") if name in fields)
    if len(ids) == 2 and row.response is not None:
        for name, value in zip(("prompt_ids", "response_ids"), ids):
            if not (isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)):
                raise UserError(f"{row.where}: field {name} is {shown(value)}; it must be a list of token ids")
        row = replace(row, ids=ids)
    return replace(row, ends=fields.get("finish_reason") != "length")


def unanswered(fields: dict) -> dict:
    """A record that has been read as a row with a prompt, without its answer; that becomes `reference`, unless there is one."""
    kept = {name: value for name, value in fields.items() if name not in (*ANSWERS, *GENERATED)}
    old = next((fields[name] for name in ANSWERS if name in fields), None)
    asked = asked_first(fields)
    turns = fields[asked]
    if isinstance(turns, list) and turns[-1]["role"] == "assistant":
        kept[asked], turn = turns[:-1], turns[-1]
        old = turn["content"] if turn.keys() == {"role", "content"} else turn
    if old is not None:
        kept.setdefault("reference", old)
    return kept


def turn_of_answer(fields: dict, where: str) -> dict | None:
    """The assistant's turn where the first answer is a list of turns, as TRL's completion."""
    name = next((name for name in ANSWERS if name in fields), "")
    value = fields.get(name)
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return None
    turns = check_turns(value, name, where)
    if len(turns) > 1 or turns[0]["role"] != "assistant":
        raise UserError(f"{where}: field {name} is {shown(value)}; it must be one turn of the assistant")
    return turns[0]


def tools_of(fields: dict, where: str) -> list[dict] | None:
    """The tools that a chat offers: a list of descriptions, or JSON of one."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: field tools is {shown(tools)}; it must be a list of tools, or JSON of one") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"{where}: field tools is {shown(tools)}; it must be a list of tools, or JSON of one")
    return tools or None


def references(fields: dict, where: str) -> tuple[str, ...]:
    """One text or a list of them under the first of ANSWERS that is there; none where all are missing."""
    name = next((name for name in ANSWERS if name in fields), "output")
    value = fields.get(name, [])
    if isinstance(value, list) and all(isinstance(reference, str) for reference in value):
        return tuple(value)
    return (string(fields, name, where, expected="a text or a list of texts"),)


def as_list(value: object) -> list:
    """One answer as a list of one."""
    return value if isinstance(value, list) else [value]


def string(fields: dict, name: str, where: str, expected: str = "a text") -> str:
    """A field's text, "" where it is missing. Raises UserError where it is something else than `expected`."""
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name} is {shown(value)}; it must be {expected}")
    return value
