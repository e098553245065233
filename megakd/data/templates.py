"""The instruction templates, by name or from a Jinja file.

`alpaca` is the one MiniLLM and PromptKD use for GPT-2, OPT and Llama, to the byte. `plain` is a line with the instruction and one
with the input if there is one. A .jinja file has the fields instruction and input; input may be empty.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megakd.data.bounded import MEMORY, SECONDS, bounded, limited_memory, limited_seconds
from megakd.errors import UserError, read_text

MOST_TEMPLATE = 2**20  # bytes

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
TEMPLATES = {  # name: (without input, with input)
    "alpaca": (ALPACA, ALPACA_WITH_INPUT),
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
}


def open_template(name: str) -> Callable[[str, str], str]:
    """From instruction and input to the text a model is asked to continue.

    Raises UserError where there is no such template, or the file is none.
    """
    if name in TEMPLATES:
        return partial(render_prompt, template=name)
    if not (name.endswith(".jinja") and Path(name).is_file()):
        raise UserError(f"--prompt-template {name}: no such template; give {', '.join(TEMPLATES)} or the path of a .jinja file")
    template = jinja_template(Path(name), "--prompt-template", ("instruction", "input"))
    template("an instruction", "")
    return template


def render_prompt(instruction: str, input: str = "", *, template: str = "alpaca") -> str:
    """By one of the named templates; `input` may be empty."""
    without_input, with_input = TEMPLATES[template]
    return with_input.format(instruction=instruction, input=input) if input else without_input.format(instruction=instruction)


def jinja_template(path: Path, flag: str, fields: Sequence[str]) -> Callable[..., str]:
    """By the template of a file that `flag` names, which sees these fields and nothing else; they are given in this order.

    Raises UserError where the file is none, or asks for another field.
    """
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    text = read_text(path, most=MOST_TEMPLATE, encoding="utf-8-sig", flag=flag)  # a byte-order mark is no part of a prompt
    way_out = f"its fields are {', '.join(fields[:-1])} and {fields[-1]}"
    try:
        with limited_seconds(SECONDS), limited_memory(MEMORY):  # constants are computed where they stand
            template = environment.from_string(text)
            unknown = meta.find_undeclared_variables(environment.parse(text)) - {*fields, *environment.globals}
    except TemplateSyntaxError as error:
        raise UserError(f"{flag} {path} line {error.lineno}: {failure(error)}; correct it") from error
    except Exception as error:  # Python compiles what Jinja makes of it, and has limits of its own
        raise UserError(f"{flag} {path}: {failure(error)}; correct it") from error
    if unknown:
        raise UserError(f"{flag} {path}: {sorted(unknown)[0]!r} is undefined; {way_out}")

    def render(*values: object) -> str:
        try:
            return bounded(lambda: template.render(dict(zip(fields, values, strict=True))))
        except Exception as error:  # a template is foreign code, and may raise anything
            raise UserError(f"{flag} {path}: {failure(error)}; {way_out}") from error

    return render


def failure(error: Exception) -> str:
    """What went wrong in a template, on one line; with the kind of error, if it is none of Jinja's."""
    said = next(iter(str(error).splitlines()), "")
    return said if isinstance(error, TemplateError) else f"{type(error).__name__}: {said}"
