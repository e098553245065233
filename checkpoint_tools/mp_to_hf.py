"""Native checkpoint to Hugging Face folder, on the CPU, in memory for a few blocks whatever the model's size.

python checkpoint_tools/mp_to_hf.py --load DIR --save HF_DIR
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from tool import Parser, add_safety, positive, run

ALIASES = {"--megatron-path": "--load", "--input-path": "--load", "--hf-path": "--save"}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """`5GB`, `200MiB` or a number of bytes."""
    match = re.fullmatch(r"(\d+)\s*([KMG]I?B)?", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 5GB or 200MiB")
    return positive(match[1]) * UNITS[match[2] or ""]


def parser() -> Parser:
    """The command's flags."""
    flags = Parser(
        "Convert any iteration of a native checkpoint to a Hugging Face folder; optimizer state is left behind.", ALIASES
    )
    folders = flags.add_argument_group("folders")
    folders.add_argument("--load", type=Path, required=True, metavar="DIR", help="native checkpoint, or one iter_* folder of it")
    folders.add_argument("--iteration", type=int, metavar="N", help="iteration to convert; the latest by default")
    folders.add_argument("--save", type=Path, required=True, metavar="HF_DIR", help="Hugging Face folder to write")
    folders.add_argument("--max-shard-size", type=size, default="5GB", help="weights beyond this size go to several files")
    add_safety(flags)
    return flags


def convert(args) -> Path:
    """The Hugging Face folder, written."""
    from megakd.checkpointing.export_hf import export_to_hf

    options = {"iteration": args.iteration, "max_shard_size": args.max_shard_size}
    return export_to_hf(args.load, args.save, **options, verify=not args.no_verify, force=args.force)


if __name__ == "__main__":
    run(parser(), convert)
