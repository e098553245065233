"""The command that looks at attention: scripts/analyze_attention.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from megakd.config.base import BaseConfig
from megakd.config.fields import POSITIVE, TEMPLATE_HELP, alias, flag


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(BaseConfig):
    """Where the heads of a model look while it reads questions, and what distillation changed: of every layer and head the entropy of its
    attention and its mass on the question's numbers, of a base model and of the students that began as it, over the same questions.

    python scripts/analyze_attention.py --model base=smollm2 kd=runs/kd/hf primed=runs/primed/hf --data gsm8k/test.jsonl --save attention

    Entropy is -sum a log a over the keys of a query, in nats, averaged over queries: 0 where a head looks at one token, log(n) where it
    looks at n alike. Mass is the attention that goes to the tokens of the question's numbers (written in digits). The first --model is
    the base; of every other one the heads are listed whose mass on numbers rose most, with the error of the difference over questions.
    --save gets attention.json and figures/: heat maps of layers and heads, their changes, and a comparison by layer, numbers as .csv.
    """

    model: Annotated[tuple[str, ...], alias("--models")] = flag(
        (), "Hugging Face folders, each as name=folder or folder: the base first, then its students", path=True
    )
    data: str = flag("", "questions: GSM8K's jsonl, or any data with prompts (docs/data.md)", path=True)
    queries: Literal["question", "answer"] = flag(
        "question", "whose attention: that of the question's own tokens, or that of the tokens that predict the right answer"
    )
    samples: int = flag(64, "how many questions, the first of --data", range=POSITIVE)
    batch_size: int = flag(8, "questions of one forward pass; attention takes layers x heads x length^2 x 4 bytes of each", range=POSITIVE)
    heads: int = flag(10, "how many heads are listed for each student", range=POSITIVE)
    dtype: Literal["auto", "bf16", "fp32"] = flag("auto", "weights and activations; auto: bf16 on a GPU, fp32 on a CPU")
    prompt_template: str = flag("alpaca", TEMPLATE_HELP, path=True)
    max_prompt_length: int = flag(256, "tokens of a prompt; rows with a longer one are left out", range=POSITIVE)
    max_answer_length: int = flag(256, "tokens of an answer, with --queries answer; longer ones are cut", range=POSITIVE)
    save: Annotated[str, alias("--output-dir")] = flag("", "folder for attention.json and figures; none: only print", path=True)
    overwrite: bool = flag(False, "replace the analysis that --save holds")

    def validation_errors(self):
        if not self.model:
            yield "--model is missing; give Hugging Face folders, the base first, as in --model base=DIR kd=DIR"
        if not self.data:
            yield "--data is missing; give a jsonl file of questions, such as GSM8K's"

    def unless(self):
        return {
            "max_answer_length": (self.queries == "answer", "without --queries answer"),
            "heads": (len(self.model) > 1, "with one --model"),
            "overwrite": (self.save, "without --save"),
        }
