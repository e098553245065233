"""What the kernels become on each card, read from machine code that any machine can make: no spills, few registers, wide accesses.

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
BUDGET = {  # kernel: registers at most on sm_90
    "statistics, two tensors": 128,
    "statistics, three tensors": 168,
    "statistics, difference": 168,
    "gradient, two tensors, first": 40,
    "gradient, two tensors, second": 40,
    "gradient, two tensors, both": 48,
    "gradient, three tensors, first": 48,
    "gradient, difference, first": 48,
    "merge, two tensors": 40,
    "merge, three tensors": 40,
    **{f"mixture sums, {op}": 64 for op in ("skew", "jsd", "tvd")},
    **{f"mixture gradient, {op}, {side}": 64 for op in ("skew", "jsd", "tvd") for side in ("student", "teacher", "both")},
    "label statistics": 64,
    "label gradient": 64,
    **{f"prompt embedding, {kind}": 40 for kind in ("rotary", "positions", "position ids")},
    "prompt gradient": 40,
}
PROGRAMS = 8  # a multiprocessor, of a launch that splits rows: as in triton_rows
OTHERS = ("sm_80", "sm_89", "sm_100", "sm_120", "gfx942")


def read(*words: str) -> dict[str, dict[str, dict[str, int]]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("machine_code.py")
    out = subprocess.run([sys.executable, script, *words], env=environment, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout)


@pytest.fixture(scope="module")
def sm_90() -> dict[str, dict[str, int]]:
    return read("sm_90")["sm_90"]


def test_every_kernel_is_watched(sm_90):
    assert set(sm_90) == set(BUDGET)


@pytest.mark.parametrize("kernel", BUDGET)
def test_no_spill_few_registers_and_128_bit_accesses(kernel, sm_90):
    code = sm_90[kernel]
    assert code["registers"] <= (BUDGET[kernel] if TRITON >= (3, 7) else 255)  # 3.6 allots more freely
    check(code)
    assert bool(code["loads_wanted"]) == (not kernel.startswith("merge"))


def check(code: dict[str, int]) -> None:
    assert code["spilled"] == 0
    assert code["loads_128"] >= code["loads_wanted"] and code["stores_128"] >= code["stores_wanted"]
    assert code["fit"] >= 2 and (code["fit"] <= PROGRAMS or not code["splits"]), "a launch fills every multiprocessor"


@pytest.mark.skipif(TRITON < (3, 7), reason="3.6 does not know every card")
def test_the_largest_kernels_fit_other_cards_too():
    found = read("--few", *OTHERS)
    assert set(found) == set(OTHERS)
    for codes in found.values():
        for code in codes.values():
            check(code)


@pytest.mark.slow
@pytest.mark.skipif(TRITON < (3, 7), reason="3.6 does not know every card")
def test_every_variant_on_every_card():
    for codes in read("--every").values():
        for code in codes.values():
            check(code)
