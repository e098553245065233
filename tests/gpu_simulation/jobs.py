"""Small runs of every method at every kind of layout, as simulated ranks."""

from __future__ import annotations

from dataclasses import replace

from tiny import tiny_config

from megakd.config import METHODS
from megakd.simulation.settings import Simulated

LAYOUTS = {  # TP, PP, DP, what else is split
    "TP1": (1, 1, 1, {}),
    "TP2 SP": (2, 1, 1, {"sequence_parallel": True}),
    "TP2 PP2": (2, 2, 1, {}),
    "DP2 zero": (1, 1, 2, {"use_distributed_optimizer": True}),
    "TP2 SP coded": (2, 1, 1, {"sequence_parallel": True, "teacher_quantize": "int8-dynamic"}),
    "deterministic": (1, 1, 1, {"deterministic_mode": True, "top_p": 0.9}),
}
FAMILY = {"TP2 SP": "llama", "TP2 SP coded": "llama"}  # with fewer key heads than query heads; GPT-2 elsewhere
PROMPTS, RESPONSES = [14, 9, 3, 7, 12, 5, 4, 8], [17, 3, 9, 16, 2, 6, 17, 11]
PER_METHOD = {"distillm": {"kd_ratio": 1.0}, "minillm": {"num_rollouts": 8}}


def job(method: str, layout: str, **changes) -> list[Simulated]:
    """All ranks. Two iterations, of which the second is recorded, an evaluation, and a checkpoint's way to the host and back."""
    tp, pp, dp, more = LAYOUTS[layout]
    teacher = {} if method == "sft" else {"teacher_model": "teacher"}
    flags = {
        "method": method, "model": "student", **teacher, "train_data": "rows", "save": "run", "train_iters": 1000, "dtype": "bf16",
        "max_length": 40, "max_prompt_length": 16, "micro_batch_size": 2, "global_batch_size": 8, "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp, **more, **PER_METHOD.get(method, {}),
    }  # fmt: skip
    sizes = {"layers": 2, "vocab_size": 1000}
    student, teacher = (tiny_config(FAMILY.get(layout, "gpt2"), hidden=hidden, **sizes).to_dict() for hidden in (128, 256))
    first = Simulated(
        flags=flags, student=student, teacher=teacher if METHODS[method].needs_teacher else None, world_size=tp * pp * dp,
        prompts=PROMPTS, responses=RESPONSES, iterations=2, after=("evaluate", "save", "load"),
    )  # fmt: skip
    first = replace(first, **changes)
    return [replace(first, rank=rank) for rank in range(first.world_size)]
