"""Exposure bias: how much worse a student gets for reading its own words (Arora et al. 2022, as MiniLLM measures it).

    R(l)         = Σ_{t ≤ l} E_{y ~ q} KL( p(·|y_<t, x) ‖ q(·|y_<t, x) )        q the student, p the teacher
    lε(l)        = Σ_{t ≤ l} E_{y ~ p} KL( p(·|y_<t, x) ‖ q(·|y_<t, x) )        l response tokens, EOS one of them
    ExAccErr(l)  = 100 (R(l) - lε(l)) / lε(l)                                   per cent; 0: its own words do no harm

A response that has ended adds nothing more. A prompt's curve is the mean over its samples; R and lε are means over prompts, with
the standard deviation over prompts (n - 1) and the error of the mean. Of the ratio both come from the prompts' residuals
R_n - (R / lε) lε_n, to first order: one prompt's R and lε go up and down together, and this is not counted as uncertainty.

n prompts, S samples, L response length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from megakd_kernels import VocabShard

from megakd.data.batch import Batch, Sample, micro_batches
from megakd.data.dataloader import split_across_dp
from megakd.evaluation.held_out import passes
from megakd.generation.answers import gather_by_index
from megakd.losses.distillation import Divergence
from megakd.teachers.live import LiveStudent
from megakd.teachers.teacher import Teacher

ROUNDING = 1e-7  # nats per token: a KL below this is rounding, and a ratio of two such means nothing


def token_divergences(
    student: LiveStudent, teacher: Teacher, samples: Sequence[Sample], *, micro_batch_size: int
) -> list[np.ndarray]:
    """KL(p‖q) at every token of each sample's response, float64, in the order of `samples`, on every rank."""
    layout = student.layout
    numbered = [replace(sample, sample_id=i) for i, sample in enumerate(samples)]
    mine: dict[int, np.ndarray] = {}
    for part in passes(split_across_dp(numbered, layout.dp_size)[layout.dp_rank], micro_batch_size):
        mine |= replica_divergences(student, teacher, micro_batches(part, micro_batch_size, device=layout.device))
    gathered = gather_by_index(mine, layout.dp_group)
    return [gathered[i] for i in range(len(samples))]


def replica_divergences(
    student: LiveStudent, teacher: Teacher, batches: Sequence[Batch]
) -> dict[int, np.ndarray]:
    """The same by sample id for one replica's batches, on each of its ranks."""
    model, layout = student.model, student.layout
    pairs = zip(*(who.read(batches, to=layout) for who in (student, teacher)))  # the last stage alone has any
    vocabulary, kl = VocabShard(model.real_vocab_size, tp_group=layout.tp_group), Divergence("forward_kl")
    total = sum(batch.num_supervised for batch in batches)
    values = torch.zeros(total, dtype=torch.double, device=layout.device)
    with torch.no_grad():
        found = [kl(q, p, vocabulary) for q, p in pairs]
    if found:
        values.copy_(torch.cat(found))
    tokens = [int(count) for batch in batches for count in batch.response_lengths]
    rows = layout.broadcast_from_last_stage(values).cpu().split(tokens)
    ids = [int(i) for batch in batches for i in batch.sample_ids]
    return {i: row.numpy() for i, row in zip(ids, rows)}


def accumulated(rows: Sequence[np.ndarray], length: int, *, skip_first: bool = False) -> np.ndarray:
    """One prompt's curve [L]: the mean over its S samples of the KL summed up to each length."""
    first = int(skip_first)
    padded = np.zeros((len(rows), length))
    for curve, row in zip(padded, rows):
        curve[: len(row) - first] = row[first : first + length]
    return padded.cumsum(1).mean(0)


def exposure_bias(on_student: np.ndarray, on_teacher: np.ndarray) -> dict[str, list[float | None]]:
    """R, lε and ExAccErr at every length, from the prompts' curves [n, L], as lists of L; _sd over prompts, _sem of the mean.

    Where lε is nothing but rounding, ExAccErr is 0 if R is, too, and None if it is not; the spreads of a single prompt are None.
    """
    regret, epsilon = on_student.mean(0), on_teacher.mean(0)
    floor = ROUNDING * np.arange(1, len(epsilon) + 1)
    known = epsilon > floor
    ratio = np.divide(regret, epsilon, out=np.full_like(regret, np.nan), where=known)
    ratio[~known & (regret <= floor)] = 1
    residuals = np.divide(on_student - ratio * on_teacher, epsilon, out=np.zeros_like(on_student), where=known)
    statistics = {"R": (regret, on_student), "l_eps": (epsilon, on_teacher), "ex_acc_err": (100 * (ratio - 1), 100 * residuals)}
    curves = {"l": np.arange(1, len(epsilon) + 1)}
    for name, (mean, values) in statistics.items():
        curves |= {name: mean} | spread(name, values)
    return {name: [None if np.isnan(x) else x for x in curve.tolist()] for name, curve in curves.items()}


def spread(name: str, values_nL: np.ndarray) -> dict[str, np.ndarray]:
    """Sample standard deviation over prompts, and the error of the mean."""
    n = len(values_nL)
    sd = values_nL.std(0, ddof=1) if n > 1 else np.full(values_nL.shape[1], np.nan)
    return {f"{name}_sd": sd, f"{name}_sem": sd / np.sqrt(n)}
