"""Native checkpoint to another TP x PP, on the CPU, with optimizer state, soft prompt and everything else it holds.

python checkpoint_tools/reshard.py --load DIR --save DIR2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 4
"""

from __future__ import annotations

from pathlib import Path

from tool import Parser, add_layout, add_safety, run

ALIASES = {"--input-path": "--load"}


def parser() -> Parser:
    """The command's flags."""
    flags = Parser("Write a native checkpoint at another layout. (Training loads any layout without this.)", ALIASES)
    folders = flags.add_argument_group("folders")
    folders.add_argument("--load", type=Path, required=True, metavar="DIR", help="native checkpoint, or one iter_* folder of it")
    folders.add_argument("--iteration", type=int, metavar="N", help="iteration to reshard; the latest by default")
    folders.add_argument("--save", type=Path, required=True, metavar="DIR2", help="checkpoint folder to write")
    add_layout(flags)
    add_safety(flags)
    return flags


def convert(args) -> Path:
    """The native checkpoint at the other layout, written."""
    from megakd.checkpointing.reshard import reshard

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    return reshard(args.load, args.save, tp=tp, pp=pp, iteration=args.iteration, verify=not args.no_verify, force=args.force)


if __name__ == "__main__":
    run(parser(), convert)
