"""Which kernels attend, in which shapes they are called, and that a sliding window costs one mask, not one a layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megakd.models import attention, flash
from megakd.runtime.deterministic import deterministic_mode

FLASH_4, FLASH_2 = flash.PACKAGES
packages = pytest.mark.parametrize("package", flash.PACKAGES, ids=lambda package: package.name)


def install(monkeypatch, *installed, attend=None, packed=None):
    """As if these were, with functions that a CPU runs."""
    found = {package.module: (attend, packed) for package in installed}
    monkeypatch.setattr(flash, "functions", found.get)


def seen_by(s: int, causal: bool, window: tuple) -> torch.Tensor:
    """[s, s] as the README has it: keys i - left to i + right of query i; -1, or None of flash-attn-4: no bound."""
    left, right = (s if bound in (-1, None) else bound for bound in window)
    return torch.ones(s, s, dtype=torch.bool).tril(0 if causal else right).triu(-left)


@packages
def test_each_package_is_called_in_its_own_shapes_and_gives_what_torch_gives(monkeypatch, package):
    """Their kernels need a GPU; their signatures do not: [b, s, n, d], fewer key/value heads, causal."""

    def attend(q, k, v, softmax_scale, causal, window_size, **dropout):
        assert list(dropout) == (["dropout_p"] if package is FLASH_2 else [])
        assert all((bound is None) == (package is FLASH_4 and reach is None) for bound, reach in zip(window_size, (window, window)))
        repeat = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)))
        out = F.scaled_dot_product_attention(q, k, v, seen_by(q.shape[2], causal, window_size), scale=softmax_scale).transpose(1, 2)
        return (out, "log-sum-exps") if package is FLASH_4 else out

    install(monkeypatch, package, attend=attend)
    query, key, value = torch.randn(7, 2, 4, 8), torch.randn(7, 2, 2, 8), torch.randn(7, 2, 2, 8)
    for window in (None, 1, 3, 7, 9):
        ours, theirs = (fn(query, key, value, 0.0, 0.3, window) for fn in (package.attention, attention.sdpa_attention))
        torch.testing.assert_close(ours, theirs)


@packages
def test_each_package_is_asked_for_sums_in_one_order_where_torch_is(monkeypatch, package):
    """`deterministic`, an argument of both packages' functions."""
    asked = []
    install(monkeypatch, package, attend=lambda q, k, v, **options: asked.append(options.get("deterministic")) or q)
    query = torch.randn(7, 2, 4, 8)
    with deterministic_mode(True):
        package.attention(query, query, query, 0.0, None, None)
    package.attention(query, query, query, 0.0, None, None)
    assert asked == [True, None]


def on_a_gpu(monkeypatch, major: int, dtype=torch.bfloat16, head: int = 64):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    return SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda", shape=(7, 2, 4, head))


def test_the_first_package_that_takes_a_call_attends(monkeypatch):
    install(monkeypatch, FLASH_4, FLASH_2)
    chosen = lambda major, dropout=0.0, **of: flash.package_for(on_a_gpu(monkeypatch, major, **of), dropout)
    assert [chosen(major) for major in (9, 10, 11)] == [FLASH_4] * 3
    assert chosen(8) is FLASH_2 and chosen(12) is FLASH_2, "cards that flash-attn-4 does not name"
    assert chosen(9, dropout=0.1) is FLASH_2, "flash-attn-4 knows no dropout"
    assert chosen(7) is None and chosen(9, dtype=torch.float32) is None
    assert flash.package_for(torch.zeros(1, dtype=torch.bfloat16), 0.0) is None, "a CPU"
    heads = [chosen(major, head=head) for major, head in ((9, 256), (10, 128), (10, 256), (9, 36), (9, 264))]
    assert heads == [FLASH_4, FLASH_4, FLASH_2, FLASH_2, None], "flash-attn-4 has Gemma's heads of 256 on Hopper alone"
    install(monkeypatch, FLASH_2)
    assert chosen(9) is FLASH_2
    install(monkeypatch, FLASH_4)
    assert chosen(8) is None and chosen(9, dropout=0.1) is None and chosen(9) is FLASH_4


def test_without_a_package_a_gpu_says_so_once_and_a_cpu_never(monkeypatch, caplog):
    install(monkeypatch)
    flash.say_once.cache_clear()
    flash.package_for(torch.zeros(1, dtype=torch.bfloat16), 0.0)
    assert not caplog.messages
    for _ in range(3):
        assert flash.package_for(on_a_gpu(monkeypatch, 9), 0.0) is None
    assert caplog.messages == ["no flash-attn-4 or flash-attn for this card is installed: torch's own attention runs"]
    flash.package_for(on_a_gpu(monkeypatch, 9), 0.1)
    assert caplog.messages[1:] == ["no flash-attn for this card is installed: torch's own attention runs, here with dropout"]
    flash.say_once.cache_clear()


def test_flash_attn_4_alone_leaves_a_folder_that_holds_no_functions(monkeypatch):
    flash.functions.cache_clear()
    monkeypatch.setattr(flash.importlib, "import_module", lambda name: SimpleNamespace())
    assert flash.functions("flash_attn") is None
    flash.functions.cache_clear()
    assert flash.functions("no_such_package") is None
    flash.functions.cache_clear()
