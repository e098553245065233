"""Hugging Face folder to native checkpoint, on the CPU, in memory for a few blocks whatever the model's size.

python checkpoint_tools/hf_to_mp.py --model HF_DIR --save DIR --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
"""

from __future__ import annotations

from pathlib import Path

from tool import Parser, add_layout, add_safety, positive, run

ALIASES = {
    "--hf-model": "--model",
    "--hf-checkpoint": "--model",
    "--hf-model-path": "--model",
    "--input-path": "--model",
    "--megatron-path": "--save",
}


def parser() -> Parser:
    """The command's flags."""
    what = "Convert a Hugging Face folder (of a family in docs/models.md), or MiniLLM's mpN in one, to a native checkpoint."
    flags = Parser(what, ALIASES, needed=("--model-type", "--source-mp-size"))
    folders = flags.add_argument_group("folders")
    folders.add_argument(
        "--model", type=Path, required=True, metavar="HF_DIR", help="Hugging Face folder, or org/name in the hub's cache"
    )
    folders.add_argument("--save", type=Path, required=True, metavar="DIR", help="checkpoint folder to write; iteration 0")
    folders.add_argument("--model-type", default="", help="what config.json has to say: opt, llama, ...; llama2 is llama")
    folders.add_argument(
        "--source-mp-size", type=positive, default=1, metavar="N", help="read HF_DIR/mpN; 1: its own weights, or mpN where it has no others"
    )
    add_layout(flags)
    add_safety(flags)
    return flags


def convert(args) -> Path:
    """The native checkpoint, written."""
    from megakd.checkpointing.import_hf import hf_to_native

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    said = {"mp_size": args.source_mp_size if args.source_mp_size > 1 else 0, "model_type": args.model_type.replace("llama2", "llama")}
    return hf_to_native(args.model, args.save, tp=tp, pp=pp, verify=not args.no_verify, force=args.force, **said)


if __name__ == "__main__":
    run(parser(), convert)
