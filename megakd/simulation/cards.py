"""GPUs by name: how much they hold and how fast they are, by data sheets (dense; SXM where there is one) and by what kernels reach."""

from __future__ import annotations

from dataclasses import dataclass

import torch

REACHED_FLOPS, REACHED_BANDWIDTH, REACHED_LINK = 0.6, 0.83, 0.75  # of the data sheet's, by large matrix products, copies and all-reduces
LEAST_KERNEL_S, HOST_LAUNCH_S, LATENCY_S = 2.0e-6, 6.0e-6, 12.0e-6  # a kernel, a launch by the host, a message


@dataclass(frozen=True)
class Card:
    """By its data sheet."""

    memory_gib: float
    flops_16: float  # per second, bfloat16 with float32 sums
    flops_32: float
    bandwidth: float  # bytes per second
    link: float  # bytes per second and direction to the other GPUs of a node

    def seconds(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        """Of a kernel, by roofline: the longer of computing and reading, and no less than a kernel takes."""
        peak = self.flops_16 if dtype in (torch.bfloat16, torch.float16) else self.flops_32
        return max(flops / (REACHED_FLOPS * peak), num_bytes / (REACHED_BANDWIDTH * self.bandwidth), LEAST_KERNEL_S)

    def message_seconds(self, num_bytes: float, ranks: int, *, both_ways: bool) -> float:
        """Of a collective by rings; an all-reduce goes both ways."""
        if ranks < 2:
            return 0.0
        share = (2 if both_ways else 1) * (ranks - 1) / ranks
        return LATENCY_S + share * num_bytes / (REACHED_LINK * self.link)


CARDS = {  # memory as CUDA counts it, GiB
    "a100": Card(79.1, 312e12, 19.5e12, 2.04e12, 300e9),
    "h100": Card(79.1, 989e12, 67e12, 3.35e12, 450e9),
    "h200": Card(139.8, 989e12, 67e12, 4.8e12, 450e9),
    "b200": Card(178.0, 2250e12, 75e12, 8.0e12, 900e9),
    "l40s": Card(44.4, 362e12, 91.6e12, 0.864e12, 32e9),
}
