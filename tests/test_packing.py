"""Rows packed one behind the other say and learn what padded rows do, by every method and family, at every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import stories
import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed import run_distributed
from stories import CASES, Batches, story_config, text_batch
from test_families import write_inputs
from test_methods import PAIRS, method_inputs
from test_models import VARIANTS
from test_trainer import command, numbers, run
from tiny import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megakd.config import Config
from megakd.data.batch import Sample, batch_of, collate, micro_batches, packed
from megakd.dry_run import largest_micro_batch, micro_batches_of
from megakd.evaluation import held_out
from megakd.methods import METHODS
from megakd.models import attention, flash
from megakd.models.model_provider import build_model, padded_vocab_size
from megakd.models.packed_rows import PackedRows
from megakd.schedules import supervised
from megakd.trainer import valid_losses

ONCE = ["sft", "seqkd, primed", "distillm", "minillm, primed", "promptkd, forward and reverse", "response_priming, primed"]
LAYOUTS = {  # tp, pp, dp, sequence parallel, cases, iterations
    "one rank": (1, 1, 1, False, ONCE, 1),
    "TP2 SP": (2, 1, 1, True, ["promptkd, primed"], 1),
    "PP2": (1, 2, 1, False, ["kd", "minillm", "promptkd"], 1),
    "TP2 PP2 SP": (2, 2, 1, True, ["response_priming, original, primed"], 1),
    "DP2": (1, 1, 2, False, ["kd, primed"], 2),
}


def learnt(layout, case, pair, parallel, iterations, *, pack, **training):
    """What some iterations of a case log, and behind them the student's weights and gradients, and the soft prompt."""
    config = story_config(case, 3, parallel)
    config = replace(config, training=replace(config.training, pack=pack, **training))
    parts = method_inputs(layout, config, pair, total_iters=stories.TOTAL_ITERS)
    parts.text = Batches(text_batch, layout) if config.minillm.lm_coef else None
    method = METHODS[config.method](parts, config, total_iters=stories.TOTAL_ITERS)
    rows = Batches(CASES[case].batch, layout)
    logged = [method.train_iteration(rows, iteration) for iteration in range(1, iterations + 1)]
    named = dict(method.student.named_parameters())
    prompt = {"soft prompt": method.soft_prompt()} if config.method == "promptkd" else {}
    return logged, {name: p.main_grad for name, p in named.items()}, {name: p.detach().clone() for name, p in (named | prompt).items()}


def check_same(layout, cases, pair, parallel, iterations=1, **training):
    for case in cases:
        runs = [learnt(layout, case, pair, parallel, iterations, pack=pack, **training) for pack in (False, True)]
        (padded, *theirs), (unpadded, *ours) = runs
        for one, other in zip(padded, unpadded, strict=True):
            assert one.pop("real_share") < 1 == other.pop("real_share"), case
            assert one == pytest.approx(other, rel=2e-6, abs=1e-6), case
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_method_learns_packed_what_it_learns_padded(layout):
    tp, pp, dp, sp, cases, iterations = LAYOUTS[layout]
    parallel = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "sequence_parallel": sp}
    run_distributed(check_same, tp * pp * dp, cases, PAIRS["gpt2"], parallel, iterations, tp=tp, pp=pp)


def test_a_run_with_adapters_recomputation_and_a_teacher_in_another_layout(tmp_path):
    """From flags to metrics.jsonl: two replicas, whose token ids travel to one teacher."""
    write_inputs(tmp_path, {"family": "qwen3", "layers": 2})
    flags = {"train-iters": 2, "lora-rank": 4, "recompute": True, "teacher-tp": 2, "micro-batch-size": 4}
    for name, more in (("padded", {}), ("packed", {"pack": True, "micro-batch-tokens": 30})):
        run_distributed(run, 2, command(tmp_path, name, "kd", **flags, **more))
    padded, unpadded = (numbers(tmp_path / name) for name in ("padded", "packed"))
    for one, other in zip(padded, unpadded, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)


# ---- a model, in float64


def rows() -> list[Sample]:
    """Some as long as each other, one of a single position."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda n: tuple(torch.randint(2, 90, (n,), generator=generator).tolist())
    return [Sample(i, draw(prompt), draw(response)) for i, (prompt, response) in enumerate([(4, 14), (3, 6), (5, 4), (2, 7), (1, 1), (6, 12)])]


def said(model, batch, soft_prompt=None):
    """Hidden states of the supervised positions, and the gradients of a function of them."""
    model.zero_grad()
    hidden = supervised(model(batch.tokens, batch.position_ids, soft_prompt, batch.packed_lengths), batch)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    (hidden * weights).sum().backward()
    gradients = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    for name, param in model.named_parameters():
        if name in gradients and getattr(param, "sequence_parallel", False):  # each rank has that of its own positions
            dist.all_reduce(gradients[name], group=model.tp_group)
    if soft_prompt is not None:
        gradients["soft prompt"], soft_prompt.grad = soft_prompt.grad, None
    return hidden.detach(), gradients


def check_model(layout, variants, soft, sequence_parallel, **overrides):
    for name in variants:
        config = tiny_config(**VARIANTS[name], layers=2)
        options = {"sequence_parallel": sequence_parallel, "dtype": torch.float64, "padded_vocab_size": padded_vocab_size([97], layout.tp_size)}
        model = build_model(config, layout, **options, **overrides).train()
        torch.manual_seed(5)
        for param in model.parameters():
            param.data.add_(0.1 * torch.randn_like(param))
        soft_prompt = torch.randn(3, model.embedding_size, dtype=torch.float64, requires_grad=True) if soft else None
        model.requires_grad_(not soft)
        batch = collate(rows())
        theirs, ours = (said(model, one, soft_prompt) for one in (batch, packed(batch)))
        atol = 1e-5 if name == "gemma3" else 1e-9  # its norms are in float32 whatever the model is
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        assert theirs[1], "something learns"


FAMILIES = ["gpt2", "opt-350m", "llama", "qwen3", "smollm3 that slides, one key/value head", "gemma3", "qwen3-moe", "opt, narrow words, own head"]


@pytest.mark.parametrize("soft", [False, True], ids=["", "behind a soft prompt"])
def test_every_family_says_the_same_packed_and_its_gradient_is_the_same(soft):
    run_distributed(check_model, 1, FAMILIES, soft, False)


def test_sequence_parallelism_fills_up_what_does_not_divide():
    """39 and 57 columns, over two ranks."""
    for soft in (False, True):
        run_distributed(check_model, 2, ["llama", "gpt2"], soft, True, tp=2)


def test_recomputed_layers_are_packed_too():
    def check(layout):
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        check_model(layout, ["mistral"], False, False, **recompute)

    run_distributed(check, 1)


def test_a_forgotten_end_of_a_row_would_be_seen(monkeypatch):
    """Attention over all rows as if they were one."""
    monkeypatch.setattr(PackedRows, "blocks", property(lambda self: [(sum(self.lengths), 1)]))
    with pytest.raises(AssertionError, match="not close"):
        run_distributed(check_model, 1, ["llama"], False, False)


def test_rows_do_not_see_each_other():
    """To the bit: what else is in the batch changes nothing that a row says."""

    def check(layout):
        model = build_model(tiny_config("llama", layers=2), layout, padded_vocab_size=128)
        first = rows()
        others = [first[0], *(replace(sample, prompt=sample.prompt[::-1], response=sample.response[::-1]) for sample in first[1:])]
        one, other = (model(b.tokens, b.position_ids, None, b.packed_lengths) for b in (packed(collate(first)), packed(collate(others))))
        count = first[0].num_positions
        assert torch.equal(one[:count], other[:count]) and not torch.equal(one[count:], other[count:])

    run_distributed(check, 1)


@pytest.mark.parametrize("package", flash.PACKAGES, ids=lambda package: package.name)
def test_flash_attn_is_told_where_rows_begin(monkeypatch, package):
    """Its kernels need a GPU; its signature does not: [s, n, d], int32 starts, the longest row."""

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, dropout_p=0.0):
        assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q is cu_seqlens_k and causal
        sizes = cu_seqlens_q.diff().tolist()
        assert max_seqlen_q == max_seqlen_k == max(sizes)
        left = -1 if window_size[0] is None else window_size[0]
        out = []
        for row in zip(*(x.split(sizes) for x in (q, k, v))):
            q, k, v = (x.repeat_interleave(row[0].shape[1] // x.shape[1], 1).transpose(0, 1) for x in row)
            size = q.shape[1]
            seen = torch.ones(size, size, dtype=torch.bool).tril().triu(-left if left >= 0 else -size)
            out.append(F.scaled_dot_product_attention(q, k, v, seen, dropout_p, scale=softmax_scale).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr(flash, "functions", {package.module: (None, varlen)}.get)
    ends = PackedRows.behind_prompts([7, 3, 3, 1], 2, multiple=4, device=torch.device("cpu"))
    assert ends.lengths == (9, 5, 5, 3, 2) and ends.blocks == [(9, 1), (5, 2), (3, 1), (2, 1)] and ends.rows == 4
    query, key, value = torch.randn(24, 1, 4, 8), torch.randn(24, 1, 2, 8), torch.randn(24, 1, 2, 8)
    for window in (None, 1, 3, 9):
        ours, theirs = (attend(ends, query, key, value, 0.0, None, window) for attend in (package.packed_attention, attention.attention_by_blocks))
        torch.testing.assert_close(ours, theirs)


# ---- batches


def test_a_packed_batch_has_the_same_labels_in_the_same_order_and_no_padding():
    samples = [replace(sample, teacher_prompt=(7, *sample.prompt)) for sample in rows()]
    padded = collate(samples)
    batch = packed(padded)
    for one, other in ((batch, padded), (batch.for_teacher, padded.for_teacher)):
        assert torch.equal(one.supervised_labels, other.supervised_labels) and one.num_supervised == sum(len(s.response) for s in samples)
        assert one.counts.tolist()[1:] == 2 * [int(other.lengths.sum())] and one.micro_batch_size == len(samples)
        assert one.packed_lengths == tuple(other.lengths.tolist()) and other.packed_lengths is None
        assert torch.equal(one.tokens[0], torch.cat([row[:n] for row, n in zip(other.tokens, other.lengths)]))
        assert torch.equal(one.position_ids[0], torch.cat([torch.arange(n) for n in other.lengths]))
        again = batch_of(*one.essence)
        assert all(torch.equal(x, getattr(again, name)) for name, x in vars(one).items() if torch.is_tensor(x))
    assert batch.samples == padded.samples


def test_packed_micro_batches_are_few_and_within_both_limits():
    samples = [Sample(i, (2,), tuple([3] * n)) for i, n in enumerate([50, 40, 30, 30, 20, 10, 10, 10])]
    batches = micro_batches(samples, 4, most_tokens=100, pack=True)
    assert [batch.lengths.tolist() for batch in batches] == [[50, 40, 10], [30, 30, 20, 10], [10]]
    assert [len(batch.lengths) for batch in micro_batches(samples, 3, pack=True)] == [3, 3, 2]
    alone = micro_batches(samples, 4, most_tokens=45, pack=True)
    assert alone[0].lengths.tolist() == [50] and sorted(i for batch in alone for i in batch.sample_ids.tolist()) == list(range(8))


def test_a_dry_run_counts_packed_positions():
    lengths = [100, 7, 5, 30]
    assert largest_micro_batch(lengths, 3, None, pack=False) == 300 and largest_micro_batch(lengths, 3, None, pack=True) == 137
    assert largest_micro_batch(lengths, 3, 120, pack=True) == 120 and largest_micro_batch(lengths, 3, 80, pack=True) == 100


def test_a_dry_run_counts_the_micro_batches_that_positions_ask_for():
    """So many are in flight on an early stage, whatever the rows of one may be."""
    lengths = [100, 90, 80, 70, 60, 8]
    assert [micro_batches_of(lengths, rows, most, None) for rows, most in ((4, 4), (4, 2), (8, 4))] == [1, 2, 2]
    assert [micro_batches_of(lengths, 4, 4, tokens) for tokens in (400, 200, 90)] == [1, 2, 4]
    samples = [Sample(i, (2,), tuple([3] * n)) for i, n in enumerate(lengths[:4])]
    for tokens in (400, 200, 90):
        assert len(micro_batches(samples, 4, most_tokens=tokens, pack=True)) >= micro_batches_of(lengths, 4, 4, tokens)
    assert micro_batches_of(lengths, 12, 12, 400) == 3  # as long as those that were looked at


def test_held_out_rows_are_packed_too(monkeypatch):
    given = []
    monkeypatch.setattr(held_out, "micro_batches", lambda *arguments, **options: given.append(options["pack"]) or micro_batches(*arguments, **options))

    def check(layout):
        means = []
        for pack in (False, True):
            config = story_config("kd", 3, {})
            config = replace(config, training=replace(config.training, pack=pack))
            parts = method_inputs(layout, config, PAIRS["gpt2"], total_iters=stories.TOTAL_ITERS)
            means.append(valid_losses(METHODS["kd"](parts, config, total_iters=stories.TOTAL_ITERS), CASES["kd"].batch(0)))
        assert given and given == sorted(given) and True in given and False in given
        assert means[0] == pytest.approx(means[1], rel=1e-6)

    run_distributed(check, 1)


def test_one_row_alone_is_cut_to_its_length():
    batch = packed(collate(rows()[:1], seq_length=40))
    assert batch.seq_length == rows()[0].num_positions and batch.packed_lengths is None


# ---- long rows


def test_attention_that_slides_takes_some_queries_at_a_time(monkeypatch):
    """Values and gradients are those of one mask over all, in float64."""
    query, key, value = (torch.randn(23, 2, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))

    def gradients(attended):
        loss = (attended * torch.arange(8.0, dtype=torch.float64)).sum()
        return attended, *torch.autograd.grad(loss, (query, key, value), retain_graph=True)

    for window in (1, 3, 9, 22):
        distance = torch.arange(23)[:, None] - torch.arange(23)
        seen = (distance >= 0) & (distance < window)
        q, k, v = query, key.repeat_interleave(2, 2), value.repeat_interleave(2, 2)
        whole = F.scaled_dot_product_attention(*(x.permute(1, 2, 0, 3) for x in (q, k, v)), attn_mask=seen).permute(2, 0, 1, 3)
        for at_once in (4, 5, 64):
            monkeypatch.setattr(attention, "QUERIES_AT_ONCE", at_once)
            ours = attention.sdpa_attention(query, key, value, 0.0, None, window)
            torch.testing.assert_close(gradients(ours), gradients(whole))


class Largest(TorchDispatchMode):
    """Numbers that the largest tensor of any operation keeps, and which."""

    numbers, operation = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if max(sizes, default=0) > self.numbers:
            self.numbers, self.operation = max(sizes), str(function)
        return out


def check_long_rows(layout, method_name, pair, lengths):
    """Neither [s, s] nor [s, V] at once; the vocabulary is wider than the models."""
    draw = lambda n, seed: tuple(torch.randint(2, 1000, (n,), generator=torch.Generator().manual_seed(seed)).tolist())
    samples = [Sample(i, draw(20, i), draw(n - 19, i)) for i, n in enumerate(lengths)]
    config = Config(method=method_name)
    config = replace(config, training=replace(config.training, micro_batch_size=4, pack=len(lengths) > 1))
    if method_name == "kd":
        config = replace(config, distillation=replace(config.distillation, hidden_coef=0.5))
    method = METHODS[method_name](method_inputs(layout, config, pair), config, total_iters=10)
    method.respond = lambda samples, iteration: list(samples)
    with Largest() as largest:
        method.train(samples, 1)
    positions = sum(lengths)
    assert largest.numbers < min(max(lengths) ** 2 / 3, positions * 1024 / 3), (largest.operation, largest.numbers)


@pytest.mark.parametrize("method, lengths", [("sft", [1400]), ("kd", [1400]), ("promptkd", [1400]), ("promptkd", [1200, 150])])
def test_nothing_grows_with_the_square_of_a_row_or_with_row_times_vocabulary(method, lengths):
    same = {"layers": 2, "vocab_size": 1000, "max_position_embeddings": 2048}
    slides = {"family": "smollm3", "no_rope_layers": [1, 0], "use_sliding_window": True, "sliding_window": 300} | same
    run_distributed(check_long_rows, 1, method, (slides, {"family": "qwen3"} | same), lengths)
