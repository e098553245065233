"""What the teacher reads where the student reads a row's prompt: data, whatever the method, the layout, and where the teacher lives.

    priming     text of the run beside the question (priming.py)
    field       a text of the row itself: the right answer, a worked solution, a hint
    template    the teacher's own chat template, where it has one

A row's teacher prompt is the prompt of the same row with its question primed, rendered as the teacher's would be: of a chat the question is
the last turn of the user, of an instruction the instruction, of a `prompt` all of it. Plain text has no question: both read the same.
"""

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from megakd.config import ConditioningConfig
from megakd.data.chat import check_turns
from megakd.data.forms import Row, RowReader, asked_first, is_chat, string
from megakd.data.priming import Priming, open_priming
from megakd.data.templates import open_template
from megakd.data.values import shown
from megakd.errors import UserError, tell

PLAIN_TEXT = "is plain text and asks nothing; the teacher reads it as the student does"


@dataclass(frozen=True)
class Conditioning:
    """`settings` are the flags, `positions` those that the teacher has for its prompt and a response; `new_tokens` is the longest response
    that a model writes, 0 where none does."""

    settings: ConditioningConfig
    prime: Priming
    reader: RowReader  # with the teacher's tokenizer
    positions: int
    new_tokens: int

    @classmethod
    def open(
        cls,
        settings: ConditioningConfig,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        *,
        template: str,
        positions: int,
        new_tokens: int = 0,
    ) -> "Conditioning | None":
        """None where both read the same.

        Raises:
            UserError: a template cannot be used.
        """
        own_template = getattr(teacher, "chat_template", None)
        same_template = own_template in (None, getattr(student, "chat_template", None))
        if same_template and not settings.adds_text:
            if settings.teacher_max_prompt_length is not None:
                tell("--teacher-max-prompt-length has no effect: the teacher reads what the student does; --max-prompt-length limits both")
            return None
        if not same_template:
            tell("student and teacher have unlike chat templates: each reads a chat as its own writes it")
        reader = RowReader(open_template(template), teacher if own_template else student)
        return cls(settings, open_priming(settings.priming), reader, positions, new_tokens)

    def row(self, row: Row, fields: dict) -> Row:
        """The row with what its teacher reads."""
        if not row.prompt or row.is_text:
            return row
        prompt = self.reader.prompt_of(self._primed(fields, row.where), row.where)
        if not prompt:
            raise UserError(f"{row.where}: --teacher-priming leaves the teacher nothing to read; let it write the question")
        return replace(row, teacher_prompt=prompt)

    def fits(self, prompt: list[int], response: list[int], where: str) -> bool:
        """Whether the row is kept.

        Raises:
            UserError: its teacher has no positions for it.
        """
        if self.settings.teacher_max_prompt_length is not None and len(prompt) > self.settings.teacher_max_prompt_length:
            return False
        room = self.positions - max(len(response), self.new_tokens)
        if len(prompt) > room:
            raise UserError(
                f"{where}: the teacher's prompt of {len(prompt)} tokens and a response of {self.positions - room} are more than the "
                f"{self.positions} positions that it has for both; leave such rows out with --teacher-max-prompt-length {room}"
            )
        return True

    def _primed(self, fields: dict, where: str) -> dict:
        """The same row with another question."""
        name, field = asked_first(fields), self._field(fields, where)
        if not is_chat(fields, name):
            return {**fields, name: self.prime(string(fields, name, where), field, fields)}
        turns = check_turns(fields[name], name, where)
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
        if last is None:
            raise UserError(f"{where}: {name} has no turn of the user, whose question is primed; add one, or leave out --teacher-priming")
        question = {**turns[last], "content": self.prime(turns[last]["content"], field, fields)}
        return {**fields, name: [*turns[:last], question, *turns[last + 1 :]]}

    def _field(self, fields: dict, where: str) -> str:
        """The row's own text for the teacher, of several the first."""
        name = self.settings.teacher_prompt_field
        value = fields.get(name, "") if name else ""
        if isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, str) or (name and name not in fields):
            has = f"field {name} is {shown(value)}" if name in fields else f"has no field {name}"
            raise UserError(f"{where}: {has}; --teacher-prompt-field names a text that every row has")
        return value
