"""Compile a Triton kernel for an H200 (sm_90) on any machine and read its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_]+)*)", re.M)


def compile_for_sm90(kernel, types: dict[str, str], constants: dict[str, object], *, num_warps: int,
                     divisible_by_16: tuple[str, ...] = ()) -> dict[str, int]:
    """{registers, stack (bytes a thread), loads, loads_128, stores, stores_128}. Pointers are taken to be 16-byte aligned."""
    names = kernel.arg_names
    aligned = [n for n, kind in types.items() if kind.startswith("*") or n in divisible_by_16]
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ops = Counter(INSTRUCTION.findall(code))
    count = lambda start, part="": sum(n for op, n in ops.items() if op.startswith(start) and part in op)
    return {"registers": registers, "stack": stack, "loads": count("LDG"), "loads_128": count("LDG", ".128"),
            "stores": count("STG"), "stores_128": count("STG", ".128")}
