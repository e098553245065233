"""Hugging Face folder to native checkpoint, on the CPU, in memory for a few blocks whatever the model's size.

python checkpoint_tools/hf_to_mp.py --model HF_DIR --save DIR --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
"""

from __future__ import annotations

from pathlib import Path

from tool import Parser, add_layout, add_safety, run

ALIASES = {
    "--hf-model": "--model",
    "--hf-checkpoint": "--model",
    "--hf-model-path": "--model",
    "--input-path": "--model",
    "--megatron-path": "--save",
}


def parser() -> Parser:
    flags = Parser("Convert a Hugging Face folder (GPT-2, OPT, Llama, Qwen2, Mistral) to a native checkpoint.", ALIASES)
    folders = flags.add_argument_group("folders")
    folders.add_argument(
        "--model", type=Path, required=True, metavar="HF_DIR", help="Hugging Face folder with safetensors weights"
    )
    folders.add_argument("--save", type=Path, required=True, metavar="DIR", help="checkpoint folder to write; iteration 0")
    add_layout(flags)
    add_safety(flags)
    return flags


def convert(args) -> Path:
    from megakd.checkpointing.import_hf import hf_to_native

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    return hf_to_native(args.model, args.save, tp=tp, pp=pp, verify=not args.no_verify, force=args.force)


if __name__ == "__main__":
    run(parser(), convert)
