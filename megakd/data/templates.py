"""The instruction templates, by name. `alpaca` is the one MiniLLM and PromptKD use for GPT-2, OPT and Llama, to the byte."""

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
TEMPLATES = {"alpaca": (ALPACA, ALPACA_WITH_INPUT)}  # name: (without input, with input)


def render_prompt(instruction: str, input: str = "", *, template: str = "alpaca") -> str:
    """The text a model is asked to continue; `input` may be empty."""
    without_input, with_input = TEMPLATES[template]
    return with_input.format(instruction=instruction, input=input) if input else without_input.format(instruction=instruction)
