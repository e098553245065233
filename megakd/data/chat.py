"""Chats: the assistant's last turn is learnt; all before it, rendered by the tokenizer's own chat template, are the prompt.

    prompt     the template's text of the turns before, up to where the assistant begins to speak
    response   what the template writes after the prompt when the answer is there, up to the sign that ends the turn

So what is learnt is the template's text of the whole chat: the space in `[/INST] Two`, an empty thinking block, the call of a tool.
Where the whole does not begin with the prompt (a thinking block that only prompts have), the response is the answer's content as
it stands, and the difference is told. EOS follows the response as everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megakd.data.bounded import bounded
from megakd.data.templates import failure
from megakd.data.tokenizer import own_eos_token
from megakd.data.values import excerpt, first_difference, shown
from megakd.errors import UserError

Turn = dict[str, object]
PROBE = "What the assistant says"  # to see what a template writes in front of it


def check_turns(turns: object, name: str, where: str) -> list[Turn]:
    """The turns of a field, contents as text.

    Raises:
        UserError: it is no list of turns with role and content.
    """
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{where}: field {name} is {shown(turns)}; it must be a list of turns")
    return [check_turn(turn, name, where) for turn in turns]


def check_turn(turn: object, name: str, where: str) -> Turn:
    """One turn; the assistant's may call tools and say nothing, and a content in parts of text is joined."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise UserError(f"{where}: a turn of {name} is {shown(turn)}; it needs role and content, two texts")
    content = turn.get("content")
    if isinstance(content, list) and content:
        content = "".join(text_of(part, name, where) for part in content)
    if content is None and turn["role"] == "assistant" and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{where}: a turn of {name} is {shown(turn)}; it needs role and content, two texts")
    return {**turn, "content": content}


def text_of(part: object, name: str, where: str) -> str:
    """The text of one part of a content."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise UserError(f"{where}: a turn of {name} has the part {shown(part)}; only text is learnt here: leave the row out")
    return text


@dataclass(frozen=True)
class Chat:
    """Turns, the last of which may be the answer, and the tools that the row offers."""

    turns: Sequence[Turn]
    tools: list[dict] | None
    tokenizer: PreTrainedTokenizerBase | None
    where: str

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{self.where} has messages, but the model's tokenizer has no chat template; put a chat_template.jinja beside its "
                "tokenizer files, or give rows with prompt and response"
            )
        named = self.tokenizer.chat_template
        if isinstance(named, dict) and "default" not in named:
            raise UserError(
                f"{self.tokenizer.name_or_path}: its chat templates are {', '.join(named)}, and none is the default; name one of "
                "them `default` in tokenizer_config.json"
            )
        if self.is_answered and len(self.turns) == 1:
            raise UserError(f"{self.where}: messages holds an answer alone; put what it answers in front of it")

    @property
    def is_answered(self) -> bool:
        """Whether the assistant spoke last."""
        return self.turns[-1]["role"] == "assistant"

    @property
    def asked(self) -> Sequence[Turn]:
        """All turns before the answer."""
        return self.turns[:-1] if self.is_answered else self.turns

    @property
    def template(self) -> str:
        """As the tokenizer has it, without the mark of its file's byte order."""
        return self.tokenizer.get_chat_template(tools=self.tools).removeprefix("\ufeff")

    def prompt(self) -> str:
        """The turns that are asked, as the template asks for an answer to them."""
        return self._render(self.asked, add_generation_prompt=True)

    def header(self, prompt: str) -> str:
        """What the template writes between the prompt and an answer, where it never heard of add_generation_prompt."""
        if "add_generation_prompt" in self.template:
            return ""
        answered = self.with_answer(PROBE)
        header = answered[len(prompt) :].partition(PROBE)[0] if answered.startswith(prompt) else ""
        return header.rstrip(" ")  # a space before a word belongs to the word

    def whole(self) -> str:
        """All turns, answer included."""
        return self._render(self.turns)

    def with_answer(self, content: str) -> str:
        """The turns that are asked and an answer to them."""
        return self._render([*self.asked, {"role": "assistant", "content": content}])

    def ignores_tools(self) -> bool:
        """Whether the template has no place for the tools that the row offers."""
        return bool(self.tools) and "tools" not in self.template

    def response(self, prompt: str, whole: str) -> str:
        """What is learnt after the prompt.

        Raises:
            UserError: only the template can say how a tool is called, and it writes another prompt before it.
        """
        content = self.turns[-1]["content"]
        if whole.startswith(prompt):
            return before_end(whole[len(prompt) :], content, self.tokenizer)
        if self.turns[-1].get("tool_calls"):
            raise UserError(
                f"{self.where}: the answer calls a tool, and the chat template writes the turns before it otherwise when the answer "
                "is there; leave the row out, or give prompt and response as text"
            )
        return content

    def _render(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        options = {"tools": self.tools, "chat_template": self.template, "add_generation_prompt": add_generation_prompt}
        options["eos_token"] = own_eos_token(self.tokenizer)
        try:
            return bounded(lambda: self.tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
        except TemplateError as error:
            raise UserError(f"{self.where}: the chat template refuses these messages ({failure(error)}); change them") from error
        except Exception as error:  # a template is foreign code, and what it does with a turn may raise anything
            raise UserError(f"{self.where}: the chat template fails on these messages ({failure(error)}); change them") from error


def before_end(rest: str, content: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes for an answer, without the sign that ends the turn, or, where it writes none, what follows the content."""
    written = rest.rstrip()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {tokenizer.eos_token}
    for end in sorted(filter(None, special), key=len, reverse=True):
        if written.endswith(end):
            return written.removesuffix(end)
    at = rest.rfind(content) if content else -1
    return rest[: at + len(content)] if at >= 0 else written


def difference(learnt: str, whole: str, end: str) -> str:
    """Where the text that is learnt, which `end` ends, and the template's part, with some of both; "" where they do not.

    Blanks that the template puts after the answer are never learnt, and nor is that there is no end.
    """
    if whole.startswith(learnt) and whole[len(learnt) :].strip() in ("", end):
        return ""
    learnt, whole = learnt + end, whole.rstrip()
    at = first_difference(learnt, whole)
    return f"from character {at + 1} the template has {excerpt(whole, at)}, and learnt is {excerpt(learnt, at)}"
