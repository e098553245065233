"""TRL's DistillationTrainer, by its documented interface: beta 1 is the reverse KL; its loss goes over logits in chunks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from megakd.config import SystemsConfig, TrainingConfig
from megakd.data.tokenizer import load_tokenizer
from megakd_benchmarks.hf_system import adamw, load
from megakd_benchmarks.systems.turns import Turn
from megakd_benchmarks.systems.workload import CHECKED, Task


class TRL:
    """The trainer without recomputed activations, which is faster."""

    recompute = False

    def __init__(self, config: SystemsConfig, task: Task, models: Path):
        student, teacher = (load(models / name, config.dtype) for name in ("student", "teacher"))
        for model in (student, teacher):
            model.generation_config.eos_token_id = None
        tokenizer = load_tokenizer(config.tokenizer)
        tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
        prompts = Dataset.from_dict({"prompt": [text for batch in task.texts for text in batch]})
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = DistillationTrainer(
            student,
            teacher,
            args=settings(config, task, self.folder.name, recompute=self.recompute),
            train_dataset=prompts,
            processing_class=tokenizer,
            optimizers=(adamw(student.parameters(), config.lr), None),
        )

    def run(self, turn: Turn) -> None:
        """Every iteration."""
        self.trainer.add_callback(TakingTurns(turn, self.trainer))
        self.trainer.train()


class RecomputingTRL(TRL):
    """The trainer as it comes."""

    recompute = True


class TakingTurns(TrainerCallback):
    """Waits before a step, and tells after it."""

    def __init__(self, turn: Turn, trainer: DistillationTrainer):
        self.turn, self.trainer = turn, trainer

    def on_step_begin(self, args, state, control, **_):
        """Its turn; who is compared is not drawn."""
        self.turn.begin()
        self.trainer.generation_config.do_sample = self.turn.number > CHECKED

    def on_log(self, args, state, control, logs, **_):
        """The step is over, its loss with the host."""
        if "loss" in logs:  # the last one sums up the training
            self.turn.end(logs["loss"])


def settings(config: SystemsConfig, task: Task, folder: str, *, recompute: bool) -> DistillationConfig:
    """A step is a global batch in micro-batches, logged as ours is; nothing is saved."""
    return DistillationConfig(
        output_dir=folder,
        beta=1.0,
        max_completion_length=config.max_new_tokens,
        generation_kwargs={"min_new_tokens": config.max_new_tokens},
        shuffle_dataset=False,
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=config.global_batch_size // config.micro_batch_size,
        max_steps=len(task.prompts),
        learning_rate=config.lr,
        lr_scheduler_type="constant",
        max_grad_norm=TrainingConfig().clip_grad,
        gradient_checkpointing=recompute,
        bf16=config.dtype == "bf16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
