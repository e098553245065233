"""Faults planted into a simulated rank before its models are built: each is one that a GPU would punish, and a CPU forgives."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megakd.data import batch
from megakd.generation import sampling
from megakd.generation.room import Room
from megakd.losses import distillation
from megakd.methods.base import Method
from megakd.models import attention
from megakd.optimizer import StudentOptimizer


def batches_stay_on_the_host(device) -> None:
    batch.Batch.to = lambda self, device: self


def counts_are_summed_on_the_host(device) -> None:
    def positions(self, batches):
        counts = sum(batch.counts for batch in batches)
        dist.all_reduce(counts, group=self.layout.dp_group)
        return {"positions": counts[1].double().to(self.layout.device), "real_share": counts[1].double().to(self.layout.device)}

    Method.positions = positions


def a_loss_in_another_type(device) -> None:
    original = attention.SDPACoreAttention.forward

    def forward(self, query, key, value, **options):
        return original(self, query, key.float(), value, **options)

    attention.SDPACoreAttention.forward = forward


def a_decode_step_that_looks(device) -> None:
    original = Room.decode

    def decode(self, tokens_B, step, *hidden):
        assert int(step) >= 0
        return original(self, tokens_B, step, *hidden)

    Room.decode = decode


def the_last_rank_reduces_once_more(device) -> None:
    original = StudentOptimizer.step

    def step(self, iteration):
        if dist.get_rank() == dist.get_world_size() - 1:
            dist.all_reduce(torch.zeros(1, device="cuda"))
        return original(self, iteration)

    StudentOptimizer.step = step


def a_stage_sends_less(device) -> None:
    from megakd.models.gpt_model import HiddenStateGPTModel

    original = HiddenStateGPTModel.forward

    def forward(self, *args, **options):
        hidden = original(self, *args, **options)
        return hidden if self.post_process or options.get("step") else hidden[:-1]

    HiddenStateGPTModel.forward = forward


def every_loss_is_looked_at(device) -> None:
    original = distillation.label_loss

    def label_loss(*args, **options):
        loss = original(*args, **options)
        loss.sum().item()
        return loss

    distillation.label_loss = label_loss


def gradients_are_kept_twice(device) -> None:
    original = StudentOptimizer.step

    def step(self, iteration):
        self.kept = [buffer.grad_data.clone() for buffer in self.ddp.buffers]
        return original(self, iteration)

    StudentOptimizer.step = step




def fractions_are_summed(device) -> None:
    sampling.keep_top_p = lambda logits_BV, p: logits_BV.masked_fill(logits_BV.softmax(-1).cumsum(-1) > p, -torch.inf)
