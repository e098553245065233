"""One method is one page that reads like its paper, and one line here."""

from megakd.methods.base import Method
from megakd.methods.distillm import DistiLLM
from megakd.methods.kd import KD
from megakd.methods.minillm import MiniLLM
from megakd.methods.promptkd import PromptKD
from megakd.methods.seqkd import SeqKD
from megakd.methods.sft import SFT

METHODS: dict[str, type[Method]] = {
    "sft": SFT,
    "kd": KD,
    "distillm": DistiLLM,
    "minillm": MiniLLM,
    "promptkd": PromptKD,
    "seqkd": SeqKD,
}
