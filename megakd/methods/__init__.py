"""One method is one page that reads like its paper. Which there are, and where, is said by their pages in megakd/config/methods/."""

import pkgutil
from collections.abc import Iterator, Mapping

from transformers import PreTrainedTokenizerBase

from megakd import config as pages
from megakd.config import Config
from megakd.data.dataloader import DataLoader
from megakd.data.end_ids import EndIds
from megakd.methods.base import Method, MethodInputs
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.optimizer import StudentOptimizer, without_a_student
from megakd.teachers.teacher import Teacher


class Methods(Mapping[str, type[Method]]):
    """The classes by name; a module is imported when its method is asked for."""

    def __getitem__(self, name: str) -> type[Method]:
        return pkgutil.resolve_name(pages.METHODS[name].implementation)

    def __iter__(self) -> Iterator[str]:
        return iter(pages.METHODS)

    def __len__(self) -> int:
        return len(pages.METHODS)


METHODS = Methods()


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
    if teacher is not None:
        teacher.on_teacher_ranks(without_a_student)
    options = {"distributed": config.parallel.use_distributed_optimizer, "overlap": config.parallel.overlap_grad_reduce}
    optimizer = StudentOptimizer(student, config.training, total_iters=total_iters, **options)
    return kind(MethodInputs(student, optimizer, teacher, tokenizer, ends, text), config, total_iters=total_iters)
