"""What the kernels become on an H200, read from the machine code that any machine can make: no spills, few registers, wide accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# name: (module, kernel, constants, warps, registers allowed, 128-bit loads and stores of the unmasked tile).
# 128 registers let two programs of 8 warps, or four of 4, share a multiprocessor; three-tensor statistics take what one may have.
AT = {"ALIGNED": True}
KERNELS = {
    "statistics, two tensors": ("kl", "statistics", {"HAS_C": False, "DIFFERENCE": False, "HAS_WEIGHTS": True, "R": 4, "L": 1024, **AT}, 4, 128, 8, 0),
    "statistics, three tensors": ("kl", "statistics", {"HAS_C": True, "DIFFERENCE": False, "HAS_WEIGHTS": True, "R": 4, "L": 2048, **AT}, 8, 255, 12, 0),
}
