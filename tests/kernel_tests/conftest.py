"""Kernels in small tiles; where there is no GPU they are interpreted (tests/conftest.py)."""

import pytest
import torch


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a few hundred columns fill heads, whole tiles, tails and splits."""
    from megakd_kernels import triton_rows
    from megakd_kernels.cross_entropy import triton as cross_entropy_triton
    from megakd_kernels.kl import triton as kl_triton
    from megakd_kernels.mixture import triton as mixture_triton

    if not torch.cuda.is_available():
        monkeypatch.setattr(kl_triton, "STATISTICS_TILE", {5: (2, 64, 4), 8: (2, 64, 4)})
        monkeypatch.setattr(kl_triton, "GRADIENT_BLOCK", 128)
        monkeypatch.setattr(mixture_triton, "BLOCK", 128)
        monkeypatch.setattr(cross_entropy_triton, "BLOCK", 128)
        monkeypatch.setattr(triton_rows, "programs_wanted", lambda x: 10)
