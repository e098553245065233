"""Chats: the assistant's last turn is the response; all before it, rendered by the tokenizer's own chat template, are the prompt.

The prompt ends where the assistant begins to speak, and EOS follows the response as everywhere.
"""

import json

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megakd.data.records import short
from megakd.errors import UserError


def split_messages(messages: object, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, tuple[str, ...]]:
    """The prompt's text, and the response; none where the last turn is not the assistant's."""
    check_messages(messages, where)
    answered = messages[-1]["role"] == "assistant"
    turns = messages[:-1] if answered else messages
    return render_chat(turns, tokenizer, where), (messages[-1]["content"],) if answered else ()


def check_messages(messages: object, where: str) -> None:
    """A list of turns with role and content, of which one at least is not the answer."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: field messages is {short(json.dumps(messages, default=str))}; it must be a list of turns")
    for turn in messages:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
            said = short(json.dumps(turn, default=str))
            raise UserError(f"{where}: a turn of messages is {said}; it needs role and content, two texts")
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        raise UserError(f"{where}: messages holds an answer alone; put what it answers in front of it")


def render_chat(turns: list[dict], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The turns as text, up to where the assistant begins to speak.

    Raises UserError where the tokenizer has no template, or its template refuses the turns.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} has messages, but the model's tokenizer has no chat template; put a chat_template.jinja beside its "
            "tokenizer files, or give rows with prompt and response"
        )
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"{where}: the chat template refuses these messages ({error.message}); change them") from error
