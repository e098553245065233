"""What methods share: what they are given, and one optimizer step of the student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megakd_kernels import VocabShard

from megakd.config import Config
from megakd.data.batch import Batch, Sample, collate, micro_batches
from megakd.data.conditioning import Conditioning
from megakd.data.dataloader import DataLoader
from megakd.data.end_ids import EndIds
from megakd.faults import check_finite
from megakd.losses.distillation import sft_loss
from megakd.models.gpt_model import HiddenStateGPTModel
from megakd.optimizer import StudentOptimizer
from megakd.reporting.stopwatch import Stopwatch
from megakd.runtime.parallel_layout import ParallelLayout
from megakd.schedules import Context, LossFunction, forward_backward, mean_of_means
from megakd.teachers.teacher import Teacher


@dataclass
class MethodInputs:
    """What a method works on: the student, its optimizer, and the frozen teacher of the methods that have one."""

    student: HiddenStateGPTModel
    optimizer: StudentOptimizer
    teacher: Teacher | None
    tokenizer: object
    ends: EndIds
    text: DataLoader | None = None  # what a method learns beside its rows (MiniLLM)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)


class Method:
    """One method. A subclass says what an iteration is; on-policy methods are given prompts, the others prompts and responses."""

    on_policy = False
    has_dropout = True  # the student, while it learns
    rollouts: Sequence[Sample] = ()  # what was written in the last iteration, by whomever

    def __init__(self, inputs: MethodInputs, config: Config, *, total_iters: int):
        self.student, self.optimizer, self.teacher = inputs.student, inputs.optimizer, inputs.teacher
        self.tokenizer, self.ends, self.time = inputs.tokenizer, inputs.ends, inputs.stopwatch
        self.config, self.total_iters = config, total_iters
        self.layout = inputs.student.layout
        self.vocabulary = VocabShard(self.student.real_vocab_size, tp_group=self.layout.tp_group)

    @classmethod
    def modules(cls, student: HiddenStateGPTModel, teacher: Teacher | None, config: Config) -> dict[str, torch.nn.Module]:
        """What the method trains beside the student's own weights, on the stage that uses it: made before the optimizer, which
        then has it; alike on the replicas and tensor-parallel ranks of a stage."""
        return {}

    @classmethod
    def reads_responses(cls, config: Config) -> bool:
        """Whether the data's own responses are learnt, be it now and then: every row must then have one."""
        return not cls.on_policy

    @classmethod
    def open_text(
        cls, config: Config, tokenizer: object, layout: ParallelLayout, conditioning: Conditioning | None = None
    ) -> DataLoader | None:
        """What the method learns beside its rows, opened before any weight is loaded."""

    @classmethod
    def answers_prompts(cls, config: Config) -> bool:
        """Whether the prompts of the data are answered anew, be it now and then: every row must then have one."""
        return cls.on_policy

    @classmethod
    def needs_prompts(cls, config: Config) -> bool:
        """Whether every row that has a response must have a prompt, too."""
        return cls.answers_prompts(config)

    def train_iteration(self, loader: DataLoader, iteration: int) -> dict[str, float]:
        """One iteration, counted from 1; returns what to log, the same on every rank."""
        return self.train(loader.samples(iteration - 1), iteration)

    def train(self, samples: Sequence[Sample], iteration: int) -> dict[str, float]:
        """The same, on this rank's share of the global batch."""
        raise NotImplementedError

    def can_be_left_after(self, iteration: int) -> bool:
        """Whether a checkpoint of this iteration has all that the next one needs."""
        return True

    def on_evaluation(self, metrics: dict[str, float]) -> None:
        """Held-out metrics, after every evaluation."""

    def extra_tensors(self) -> dict[str, torch.Tensor]:
        """What the method itself learns, alike on all ranks: saved with a checkpoint."""
        return {}

    def soft_prompt(self) -> torch.Tensor | None:
        """What the method has trained in front of the teacher, [prompt positions, H], on every rank: a run leaves it beside the student."""

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill them in place with what a checkpoint holds."""
        for name, tensor in self.extra_tensors().items():
            tensor.copy_(tensors[name])

    def batches(self, samples: Sequence[Sample], collate: Callable[[Sequence[Sample]], Batch] = collate) -> list[Batch]:
        """Micro-batches within --micro-batch-size and --micro-batch-tokens, of rows of like length or packed."""
        training = self.config.training
        options = {"most_tokens": training.micro_batch_tokens, "pack": training.pack, "device": self.layout.device, "collate": collate}
        return micro_batches(samples, training.micro_batch_size, **options)

    def read_teacher(self, batches: Sequence[Batch]) -> Context:
        """What the teacher says at the supervised positions of every micro-batch, on the last stage."""
        with self.time("teacher"):
            return self.teacher.read(batches, to=self.layout)

    def student_step(
        self, batches: list[Batch], loss: LossFunction, iteration: int, *, context: Context = ()
    ) -> dict[str, float]:
        """Gradients of the token mean over the global batch, and one optimizer step; `context` is what the loss gets beside each
        micro-batch.

        Raises:
            NonFiniteError: a loss or the gradient's norm is NaN or infinite; no step was taken.
        """
        with self.time("student_step"):
            self.student.train()
            self.optimizer.zero_grad()
            loss = normalised(loss, batches, self.config, self.layout)
            means = forward_backward(self.optimizer.ddp, batches, loss, context=context, layout=self.layout)
        with self.time("optimizer"):
            learnt = to_floats(means | self.positions(batches))
            counts = {"positions": int(learnt.pop("positions")), "real_share": learnt.pop("real_share")}
            check_finite(learnt, batches, context, loss)
            step = self.optimizer.step(iteration)
            check_finite(step, batches, context, loss)
            if self.teacher:
                self.teacher.after_step(self.student)
        return learnt | step | counts

    def cross_entropy_step(self, samples: Sequence[Sample], iteration: int) -> dict[str, float]:
        """One step on −log q of the responses: no teacher reads."""
        loss = lambda q, batch, _: sft_loss(q, batch.supervised_labels, self.vocabulary)
        return self.student_step(self.batches(samples), loss, iteration)

    def positions(self, batches: list[Batch]) -> dict[str, torch.Tensor]:
        """Real input positions of the global batch, and their share of the positions computed; float64, for nobody waits for them here."""
        counts = sum(batch.counts for batch in batches).to(self.layout.device, non_blocking=True)
        _, real, computed = self.layout.sum_over_data_parallel(counts).double()
        return {"positions": real, "real_share": real / computed}

    def all_gather_samples(self, samples: Sequence[Sample]) -> list[Sample]:
        """What each replica has, on every rank, in the order of the replicas."""
        replicas: list[Sequence[Sample]] = [()] * self.layout.dp_size
        dist.all_gather_object(replicas, samples, group=self.layout.dp_group)
        return [sample for replica in replicas for sample in replica]


def normalised(loss: LossFunction, batches: list[Batch], config: Config, layout: ParallelLayout) -> LossFunction:
    """A token mean over the global batch, or the reference's mean of means."""
    return mean_of_means(loss, batches, layout) if config.training.reference_compat.mean_of_means else loss


def to_floats(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """One read from the device for all of them."""
    return dict(zip(values, torch.stack(list(values.values())).tolist()))
