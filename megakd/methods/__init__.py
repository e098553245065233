"""One method is one page that reads like its paper, and one line here."""

from transformers import PreTrainedTokenizerBase

from megakd.config import Config
from megakd.data.dataloader import DataLoader
from megakd.data.end_ids import EndIds
from megakd.methods.base import Method, MethodInputs
from megakd.methods.distillm import DistiLLM
from megakd.methods.kd import KD
from megakd.methods.minillm import MiniLLM
from megakd.methods.promptkd import PromptKD
from megakd.methods.seqkd import SeqKD
from megakd.methods.sft import SFT
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.optimizer import StudentOptimizer
from megakd.teachers.teacher import Teacher

METHODS: dict[str, type[Method]] = {
    "sft": SFT,
    "kd": KD,
    "distillm": DistiLLM,
    "minillm": MiniLLM,
    "promptkd": PromptKD,
    "seqkd": SeqKD,
}


def build_method(
    config: Config,
    student: HiddenStateGPTModel,
    teacher: Teacher | None,
    tokenizer: PreTrainedTokenizerBase,
    ends: EndIds,
    text: DataLoader | None = None,
    *,
    total_iters: int,
) -> Method:
    """The method of a run, with its own trained parts in the student's optimizer."""
    kind = METHODS[config.method]
    student.method_parts.update(kind.modules(student, teacher, config))
    distributed = config.parallel.use_distributed_optimizer
    optimizer = StudentOptimizer(student, config.training, total_iters=total_iters, distributed=distributed)
    return kind(MethodInputs(student, optimizer, teacher, tokenizer, ends, text), config, total_iters=total_iters)
