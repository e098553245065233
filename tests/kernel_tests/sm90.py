"""Compile the Triton kernels for an H200 (sm_90) on any machine and read their machine code: python sm90.py prints it as JSON.

A process of its own: under TRITON_INTERPRET nothing can be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import triton
from megakd_kernels.cross_entropy import triton as cross_entropy_triton
from megakd_kernels.kl import triton as kl_triton
from megakd_kernels.mixture import triton as mixture_triton
from megakd_kernels.prompt_embedding import triton as prompt_embedding_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_]+)*)", re.M)
FLOAT32_POINTERS = re.compile(r"(weights|stats|top_.|sum_.|top|sum|kl_.*|scale|coef|lse|x|y)_ptr")
INT64_POINTERS = ("labels_ptr", "tokens_ptr", "position_ids_ptr")
FLOATS = ("k", "share", "log_share", "log_rest")
MULTIPLES_OF_16 = ("split_columns", "H")  # the first is a multiple of a tile; strides are odd: V = 50257


def argument_type(kernel: str, name: str) -> str:
    if name in INT64_POINTERS:
        return "*i64"
    if FLOAT32_POINTERS.fullmatch(name) or (name == "out_ptr" and kernel != "embed_kernel"):
        return "*fp32"
    return "*bf16" if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32"


def compile_for_sm90(kernel, constants: dict[str, object], num_warps: int) -> dict[str, int]:
    """Registers and stack bytes of a thread; how many global loads and stores there are, in all and of 128 bits."""
    names = kernel.arg_names
    types = {n: argument_type(kernel.fn.__name__, n) for n in names if n not in constants}
    aligned = [n for n, kind in types.items() if kind.startswith("*") or n in MULTIPLES_OF_16]
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


def variants():
    """(name, kernel, constants, warps) of every kernel that a training run launches."""
    statistics, gradient = kl_triton.statistics_kernel, kl_triton.gradient_kernel
    for name, third, difference in (("two tensors", False, False), ("three tensors", True, False), ("difference", True, True)):
        R, L, warps = kl_triton.STATISTICS_TILE[8 if third else 5]
        head = {"HAS_C": third, "DIFFERENCE": difference, "ALIGNED": True}
        yield f"statistics, {name}", statistics, {**head, "HAS_WEIGHTS": True, "R": R, "L": L}, warps
        sides = {"first": (True, False)} if third else {"first": (True, False), "second": (False, True), "both": (True, True)}
        for side, (a, b) in sides.items():
            constants = {**head, "WANT_A": a, "WANT_B": b, "BLOCK": kl_triton.GRADIENT_BLOCK}
            yield f"gradient, {name}, {side}", gradient, constants, kl_triton.GRADIENT_WARPS
    yield "merge", kl_triton.merge_kernel, {"HAS_C": True, "BLOCK": 128}, 4
    mixture = {"ALIGNED": True, "BLOCK": mixture_triton.BLOCK}
    for op, name in enumerate(("skew", "jsd", "tvd")):
        constants = {**mixture, "OP": op, "HAS_WEIGHTS": True}
        yield f"mixture sums, {name}", mixture_triton.mixture_sums_kernel, constants, mixture_triton.WARPS
        constants = {**mixture, "OP": op, "WANT_Q": True, "WANT_P": False}
        yield f"mixture gradient, {name}", mixture_triton.mixture_gradient_kernel, constants, mixture_triton.WARPS
    label = {"ALIGNED": True, "BLOCK": cross_entropy_triton.BLOCK}
    yield ("label statistics", cross_entropy_triton.label_statistics_kernel, {**label, "HAS_WEIGHTS": True},
           cross_entropy_triton.WARPS)
    yield "label gradient", cross_entropy_triton.label_gradient_kernel, label, cross_entropy_triton.WARPS
    embedding = {"BLOCK": prompt_embedding_triton.BLOCK}
    yield ("prompt embedding", prompt_embedding_triton.embed_kernel,
           {**embedding, "HAS_POSITIONS": True, "HAS_IDS": True, "OWNS_PROMPT": True}, prompt_embedding_triton.WARPS)
    yield "prompt gradient", prompt_embedding_triton.prompt_gradient_kernel, embedding, prompt_embedding_triton.WARPS


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps({name: compile_for_sm90(kernel, constants, warps) for name, kernel, constants, warps in variants()}))
