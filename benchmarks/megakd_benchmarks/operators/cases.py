"""What is measured: losses at sizes that matter, and all who compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import megakd_kernels as mk
import torch
import torch.nn.functional as F
from torch import Tensor

from megakd_benchmarks.operators.baselines import (
    by_autograd,
    jsd,
    jsd_two_passes,
    liger_reverse_kl,
    megakd,
    minimal,
    prompt_two_passes,
    promptkd_formula,
    two_passes,
)

CHECKED_ROWS = 32  # rows of a gradient compared with float64: the whole would not fit


@dataclass(frozen=True)
class Case:
    """One size of one loss, and all who compute it."""

    name: str
    inputs: Callable[[torch.device], list[Tensor]]
    exact: Callable[..., Tensor]      # the loss in plain torch, called with float64 inputs
    bytes_needed: int
    implementations: dict[str, Callable[..., tuple[Tensor, Tensor]] | None]
    checked_rows: int = CHECKED_ROWS  # of the first input; 0 compares all of it with all rows in float64


def logits(rows: int, columns: int, models: int) -> Callable[[torch.device], list[Tensor]]:
    """Peaked student logits in bfloat16, correlated teachers, one row in eight equal to the student's."""
    def make(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda: torch.randn(rows, columns, generator=generator, device=device)
        student = 4 * draw()
        teachers = [(0.8 * student + 2 * draw()).where((torch.arange(rows, device=device) % 8 != 0)[:, None], student)
                    for _ in range(models - 1)]
        return [x.bfloat16() for x in (student, *teachers)]
    return make


def reverse_kl_case(rows: int, columns: int, device: str) -> Case:
    """10 bytes an element: two bfloat16 logits read twice, one gradient written."""
    others = {
        "PromptKD's formula": by_autograd(promptkd_formula),
        "minimal eager": by_autograd(minimal),
        "torch.compile, autograd": by_autograd(torch.compile(minimal)),
        "torch.compile, two passes": torch.compile(two_passes),
        "Liger JSD": liger_reverse_kl() if device == "cuda" else None,
    }
    ours = megakd(lambda s, t: mk.kl_div(s, t).sum(), device)
    return Case(f"reverse KL {rows}x{columns}", logits(rows, columns, 2), minimal, 10 * rows * columns, {**others, **ours})


def prompt_case(rows: int, columns: int, device: str) -> Case:
    """14 bytes an element: three logits read twice, one gradient written."""
    sum_of_two = lambda kl: lambda t, s, b: kl(t, s) + 0.7 * kl(t, b)
    return Case(f"prompt loss {rows}x{columns}", logits(rows, columns, 3), sum_of_two(minimal), 14 * rows * columns, {
        "PromptKD's formula": by_autograd(sum_of_two(promptkd_formula)),
        "minimal eager": by_autograd(sum_of_two(minimal)),
        "torch.compile, autograd": by_autograd(torch.compile(sum_of_two(minimal))),
        "torch.compile, two passes": torch.compile(prompt_two_passes),
        **megakd(lambda t, s, b: mk.promptkd_loss(t, s, b, base_coef=0.7)[0].sum(), device),
    })


def jsd_case(rows: int, columns: int, device: str) -> Case:
    """14 bytes an element: two logits read three times, for a mixture needs its normalisers first; one gradient written."""
    return Case(f"JSD {rows}x{columns}", logits(rows, columns, 2), jsd, 14 * rows * columns, {
        "minimal eager": by_autograd(jsd),
        "torch.compile, autograd": by_autograd(torch.compile(jsd)),
        "torch.compile, two passes": torch.compile(jsd_two_passes),
        **megakd(lambda s, t: mk.kl_div(s, t, objective="jsd").sum(), device, option=False),
    })


def fused_case(rows: int, columns: int, student: int, teacher: int, device: str) -> Case:
    """Both heads and the reverse KL; the student's head learns, and its gradient is made but hidden states' is compared."""
    def inputs(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        tensors = [draw(rows, student), 3 * draw(columns, student) / student**0.5,
                   draw(rows, teacher), 3 * draw(columns, teacher) / teacher**0.5]
        return [x.bfloat16() for x in tensors]

    def with_weight(kl: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda hs, Ws, ht, Wt: kl(hs, Ws.detach().requires_grad_(hs.requires_grad), ht, Wt)

    whole = lambda hs, Ws, ht, Wt: minimal(hs @ Ws.t(), ht @ Wt.t())
    return Case(f"fused head {rows}x{columns}, {student}/{teacher}", inputs, whole, 10 * rows * columns, {
        "minimal eager": by_autograd(with_weight(whole)),
        "torch.compile, autograd": by_autograd(torch.compile(with_weight(whole))),
        **megakd(with_weight(lambda *x: mk.fused_linear_kl(*x).sum()), device),
    })


def embedding_case(batch: int, length: int, hidden: int) -> Case:
    """The gradient is that of the soft prompt; upstream is one."""
    def inputs(device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        tokens = torch.randint(0, 50257, (batch, length), generator=generator, device=device)
        return [draw(7, hidden), draw(50257, hidden).bfloat16(), draw(length + 7, hidden).bfloat16(), tokens]

    def plain(prompt: Tensor, words: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        x = torch.cat([prompt.to(words.dtype).expand(len(tokens), -1, -1), F.embedding(tokens, words)], 1)
        return (x + positions).sum()

    rows = batch * (length + 7)
    return Case(f"prompt embedding {batch}x{length}x{hidden}", inputs, plain, 4 * rows * hidden, {
        "minimal eager": by_autograd(plain),
        "torch.compile, autograd": by_autograd(torch.compile(plain)),
        "megakd": by_autograd(lambda p, w, pos, ids: mk.prompt_embedding(ids, w, p, pos).sum()),
    }, checked_rows=0)


def cases(device: str) -> list[Case]:
    """The sizes whose targets are written down come first; small ones, where launches cost most, are kept."""
    if device == "cpu":
        return [reverse_kl_case(512, 50257, device), reverse_kl_case(64, 128256, device), prompt_case(128, 50257, device),
                jsd_case(128, 50257, device), fused_case(256, 50257, 256, 512, device), embedding_case(8, 512, 1600)]
    return [reverse_kl_case(8192, 128256, device), prompt_case(8192, 128256, device), fused_case(8192, 128256, 4096, 4096, device),
            jsd_case(8192, 128256, device), reverse_kl_case(8192, 50257, device), reverse_kl_case(8192, 32000, device),
            reverse_kl_case(8192, 16032, device), fused_case(8192, 50257, 768, 1600, device), embedding_case(8, 1024, 5120),
            reverse_kl_case(1024, 151936, device), reverse_kl_case(64, 32000, device)]
