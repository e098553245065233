"""What the kernels become on an H200, read from machine code that any machine can make: no spills, few registers, wide accesses.

A masked tile (the first and the last of a row) is read number by number. So the count of 128-bit accesses is that of the unmasked
tile: with R rows of eight columns a thread, R loads a tensor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRITON = tuple(map(int, pytest.importorskip("triton").__version__.split(".")[:2]))

# registers: of 65,536 on a multiprocessor; 168 leave room for three programs of 4 warps, 128 for four, 64 for four of 8 warps.
BUDGET = {  # kernel: registers at most, 128-bit loads, 128-bit stores
    "statistics, two tensors": (128, 8, 0),
    "statistics, three tensors": (168, 6, 0),
    "statistics, difference": (168, 6, 0),
    "gradient, two tensors, first": (40, 2, 1),
    "gradient, two tensors, second": (40, 2, 1),
    "gradient, two tensors, both": (48, 2, 2),
    "gradient, three tensors, first": (48, 3, 1),
    "gradient, difference, first": (48, 3, 1),
    "merge": (40, 0, 0),
    "mixture sums, skew": (64, 2, 0),
    "mixture gradient, skew": (64, 2, 1),
    "mixture sums, jsd": (64, 2, 0),
    "mixture gradient, jsd": (64, 2, 1),
    "mixture sums, tvd": (64, 2, 0),
    "mixture gradient, tvd": (64, 2, 1),
    "label statistics": (64, 2, 0),
    "label gradient": (64, 2, 2),
    "prompt embedding": (40, 3, 1),
    "prompt gradient": (40, 2, 2),
}


@pytest.fixture(scope="module")
def machine_code() -> dict[str, dict[str, int]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, Path(__file__).with_name("sm90.py")], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


def test_every_kernel_is_watched(machine_code):
    assert set(machine_code) == set(BUDGET)


@pytest.mark.parametrize("kernel", BUDGET)
def test_no_spill_few_registers_and_128_bit_accesses(kernel, machine_code):
    registers, loads, stores = BUDGET[kernel]
    code = machine_code[kernel]
    assert code["stack"] == 0
    assert code["registers"] <= (registers if TRITON >= (3, 7) else 255)  # 3.6 allots more freely
    assert code["loads_128"] >= loads and code["stores_128"] >= stores
