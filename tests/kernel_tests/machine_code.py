"""Compile the Triton kernels for a card on any machine and read their machine code.

    python machine_code.py sm_90 sm_100                     # the variants that most launches take, as JSON
    python machine_code.py --every --out table.md           # every variant for every card, as a table: twenty minutes on one core

A process of its own: under TRITON_INTERPRET nothing can be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import triton
from megakd_kernels.cross_entropy import triton as cross_entropy_triton
from megakd_kernels.gumbel import triton as gumbel_triton
from megakd_kernels.kl import triton as kl_triton
from megakd_kernels.mixture import triton as mixture_triton
from megakd_kernels.prompt_embedding import triton as prompt_embedding_triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+(?:\.[A-Z0-9_]+)*)", re.M)
FLOAT32_POINTERS = re.compile(r"(weights|stats|top_.|sum_.|top|sum|kl_.*|scale|coef|lse|score|best|x|y)_ptr")
INT64_POINTERS = ("labels_ptr", "tokens_ptr", "position_ids_ptr", "streams_ptr", "positions_ptr", "column_ptr", "token_ptr")
FLOATS = ("k", "share", "log_share", "log_rest", "temperature")
MULTIPLES_OF_16 = ("split_columns", "H")  # the first is a multiple of a tile
DTYPES = {"bf16": 2, "fp32": 4}  # bytes; a run has no others
FEW = ("statistics, two tensors", "gradient, two tensors, both", "mixture gradient, skew, both")


@dataclass(frozen=True)
class Card:
    """What a multiprocessor (a CU) has: registers a lane of one scheduler or all of them, and threads at most."""

    target: GPUTarget
    registers: int  # of 32 bits, in all
    threads: int
    granule: int  # of registers, by which a thread gets them


CARDS = {
    "sm_80": Card(GPUTarget("cuda", 80, 32), 65536, 2048, 8),  # A100
    "sm_89": Card(GPUTarget("cuda", 89, 32), 65536, 1536, 8),  # L40S, RTX 4090
    "sm_90": Card(GPUTarget("cuda", 90, 32), 65536, 2048, 8),  # H100, H200
    "sm_100": Card(GPUTarget("cuda", 100, 32), 65536, 2048, 8),  # B200
    "sm_120": Card(GPUTarget("cuda", 120, 32), 65536, 1536, 8),  # RTX PRO 6000, RTX 5090
    "gfx942": Card(GPUTarget("hip", "gfx942", 64), 4 * 512 * 64, 2048, 8),  # MI300X: vector registers of four SIMDs
}


@dataclass(frozen=True)
class Variant:
    """A kernel as one kind of call launches it."""

    name: str
    kernel: object
    constants: dict[str, object]
    warps: int  # of 32 threads
    loads: int = 0  # tensors that an unmasked tile reads
    stores: int = 0  # and writes in their own type
    tile: int = 0  # numbers of each
    dtype: str = "bf16"
    strides_of_16: bool = False  # else odd, as of V = 50257
    rare: str = ""  # what is unlike most launches, for the name

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.name, self.rare)))

    def wide(self, tensors: int) -> int:
        """Accesses of 128 bits that so many tensors take in one tile."""
        return tensors * self.tile * DTYPES[self.dtype] // (16 * 32 * self.warps) if self.constants.get("ALIGNED", True) else 0


def argument_type(variant: Variant, name: str) -> str:
    if name in INT64_POINTERS or (name == "position_ptr" and variant.kernel is gumbel_triton.scores_kernel):  # else a table
        return "*i64"
    if FLOAT32_POINTERS.fullmatch(name) or (name == "out_ptr" and variant.kernel.fn.__name__ != "embed_kernel"):
        return "*fp32"
    return f"*{variant.dtype}" if name.endswith("_ptr") else "fp32" if name in FLOATS else "i32"


def compiled(variant: Variant, card: Card):
    names, constants = variant.kernel.arg_names, variant.constants
    types = {n: argument_type(variant, n) for n in names if n not in constants}
    multiple = lambda n: n in MULTIPLES_OF_16 or (variant.strides_of_16 and n.startswith("stride"))
    aligned = [n for n, kind in types.items() if kind.startswith("*") or multiple(n)]
    source = ASTSource(
        fn=variant.kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=card.target, options={"num_warps": max(1, variant.warps * 32 // card.target.warp_size)})


def read(variant: Variant, card: Card) -> dict[str, int]:
    """Registers and spilled bytes of a thread, how many programs fit a multiprocessor by their registers, whether a launch splits rows,
    and how many global loads and stores there are, in all and of 128 bits; `_wanted` is what an unmasked tile takes."""
    asm = compiled(variant, card).asm
    code = of_amd(asm["amdgcn"]) if "amdgcn" in asm else of_nvidia(asm["cubin"])
    threads = max(32 * variant.warps, card.target.warp_size)
    allotted = -(-code["registers"] // card.granule) * card.granule
    fit = min(card.registers // (allotted * threads), card.threads // threads)
    return code | {"fit": fit, "splits": {"split_columns", "ALIGNED"} <= set(variant.kernel.arg_names), "loads_wanted": variant.wide(variant.loads), "stores_wanted": variant.wide(variant.stores)}


def of_nvidia(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ops = Counter(INSTRUCTION.findall(code))
    count = lambda start, part="": sum(n for op, n in ops.items() if op.startswith(start) and part in op)
    return {"registers": registers, "spilled": stack, "loads": count("LDG"), "loads_128": count("LDG", ".128"),
            "stores": count("STG"), "stores_128": count("STG", ".128")}  # fmt: skip


def of_amd(code: str) -> dict[str, int]:
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))
    count = lambda words: len(re.findall(rf"^\s*(?:buffer|global)_{words}\b", code, re.M))
    spilled = number("private_segment_fixed_size") + 4 * number("vgpr_spill_count")
    return {"registers": number("vgpr_count"), "spilled": spilled, "loads": count(r"load_\w+"), "loads_128": count("load_dwordx4"),
            "stores": count(r"store_\w+"), "stores_128": count("store_dwordx4")}  # fmt: skip


def usual() -> Iterator[Variant]:
    """As most launches of a training run: bfloat16, an odd vocabulary, rows with weights."""
    for third, difference in ((False, False), (True, False), (True, True)):
        name = ("three tensors" if third else "two tensors") if not difference else "difference"
        R, L, warps = kl_triton.STATISTICS_TILE[8 if third else 5]
        head = {"HAS_C": third, "DIFFERENCE": difference, "ALIGNED": True}
        tensors = 3 if third else 2
        constants = {**head, "HAS_WEIGHTS": True, "R": R, "L": L}
        yield Variant(f"statistics, {name}", kl_triton.statistics_kernel, constants, warps, tensors, 0, R * L)
        sides = {"first": (True, False)} if third else {"first": (True, False), "second": (False, True), "both": (True, True)}
        for side, (a, b) in sides.items():
            block, warps = kl_triton.GRADIENT_BLOCK, kl_triton.GRADIENT_WARPS
            constants = {**head, "WANT_A": a, "WANT_B": b, "BLOCK": block}
            yield Variant(f"gradient, {name}, {side}", kl_triton.gradient_kernel, constants, warps, tensors, a + b, block)
    for third in (False, True):
        constants = {"HAS_C": third, "BLOCK": kl_triton.MERGE_BLOCK}
        yield Variant(f"merge, {'three' if third else 'two'} tensors", kl_triton.merge_kernel, constants, kl_triton.MERGE_WARPS)
    yield from usual_of_mixtures()
    block, warps, label = cross_entropy_triton.BLOCK, cross_entropy_triton.WARPS, {"ALIGNED": True, "BLOCK": cross_entropy_triton.BLOCK}
    yield Variant("label statistics", cross_entropy_triton.label_statistics_kernel, {**label, "HAS_WEIGHTS": True}, warps, 1, 0, block)
    yield Variant("label gradient", cross_entropy_triton.label_gradient_kernel, label, warps, 1, 1, block)
    block, warps, embedding = prompt_embedding_triton.BLOCK, prompt_embedding_triton.WARPS, {"BLOCK": prompt_embedding_triton.BLOCK}
    for name, positions, ids in (("rotary", False, False), ("positions", True, False), ("position ids", True, True)):
        constants = {**embedding, "HAS_POSITIONS": positions, "HAS_IDS": ids, "OWNS_PROMPT": True}
        yield Variant(f"prompt embedding, {name}", prompt_embedding_triton.embed_kernel, constants, warps, 2 + positions, 1, block)
    yield Variant("prompt gradient", prompt_embedding_triton.prompt_gradient_kernel, embedding, warps, 1, 0, block)
    yield Variant("gumbel scores", gumbel_triton.scores_kernel, {"BLOCK": gumbel_triton.BLOCK}, gumbel_triton.WARPS)  # computes, mostly
    yield Variant("merge, gumbel scores", gumbel_triton.merge_kernel, {"MERGED": gumbel_triton.MERGED}, gumbel_triton.MERGE_WARPS)


def usual_of_mixtures() -> Iterator[Variant]:
    block, warps = mixture_triton.BLOCK, mixture_triton.WARPS
    mixture = {"ALIGNED": True, "BLOCK": block}
    for op, name in enumerate(("skew", "jsd", "tvd")):
        constants = {**mixture, "OP": op, "HAS_WEIGHTS": True}
        yield Variant(f"mixture sums, {name}", mixture_triton.mixture_sums_kernel, constants, warps, 2, 0, block)
        for side, (q, p) in {"student": (True, False), "teacher": (False, True), "both": (True, True)}.items():
            constants = {**mixture, "OP": op, "WANT_Q": q, "WANT_P": p}
            yield Variant(f"mixture gradient, {name}, {side}", mixture_triton.mixture_gradient_kernel, constants, warps, 2, q + p, block)


CHOICES = {"ALIGNED": (True, False), "HAS_WEIGHTS": (True, False), "OWNS_PROMPT": (True, False)}  # what a call may change


def every() -> Iterator[Variant]:
    """All that a run can meet: both types of logits, rows of any width and place, all without weights, ranks without the prompt."""
    for variant in usual():
        names = [name for name in CHOICES if name in variant.constants]
        strided = (False, True) if any(name.startswith("stride") for name in variant.kernel.arg_names) else (False,)
        typed = ("bf16",) if variant.name.startswith("merge") or variant.name == "draw, merge" else DTYPES
        for dtype, of_16, values in product(typed, strided, product(*(CHOICES[name] for name in names))):
            rare = [dtype] * (dtype != "bf16") + ["strides of 16"] * of_16
            rare += [f"{name} {value}" for name, value in zip(names, values) if not value]
            chosen = dict(zip(names, values))
            loads = variant.loads - (not chosen.get("OWNS_PROMPT", True))  # which has no prompt to read
            yield Variant(
                variant.name, variant.kernel, variant.constants | chosen, variant.warps, loads, variant.stores, variant.tile, dtype, of_16, ", ".join(rare),
            )  # fmt: skip


def table(found: dict[str, dict[str, dict[str, int]]]) -> str:
    """A row a kernel: the most registers of its variants and the fewest programs that fit, by card."""
    of = lambda kernel, name: name == kernel or name.startswith(f"{kernel}, ")
    kernels = [v.name for v in usual() if any(of(v.name, name) for codes in found.values() for name in codes)]
    lines = [f"| registers (programs at once) | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    for kernel in kernels:
        cells = []
        for by_variant in found.values():
            codes = [code for name, code in by_variant.items() if of(kernel, name)]
            cells.append(f"{max(code['registers'] for code in codes)} ({min(code['fit'] for code in codes)})")
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    bad = [f"{card}: {name}" for card, codes in found.items() for name, code in codes.items() if not good(code)]
    count = sum(map(len, found.values()))
    return "\n".join([*lines, "", f"{count} variants compiled by Triton {triton.__version__}; spilled or narrow: {'; '.join(bad) or 'none'}.", ""])


def good(code: dict[str, int]) -> bool:
    """Nothing spilled, and no access of an unmasked tile narrower than 128 bits."""
    return not code["spilled"] and code["loads_128"] >= code["loads_wanted"] and code["stores_128"] >= code["stores_wanted"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="*", help=f"of {', '.join(CARDS)}; all by default")
    parser.add_argument("--every", action="store_true", help="every variant, not the usual ones alone")
    parser.add_argument("--few", action="store_true", help=f"{'; '.join(FEW)} alone")
    parser.add_argument("--out", type=Path, help="a table in place of JSON")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    variants = [v for v in (every() if args.every else usual()) if not args.few or v.name in FEW]
    found = {card: {str(v): read(v, CARDS[card]) for v in variants} for card in args.cards or CARDS}
    if args.out:
        args.out.write_text(table(found))
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
