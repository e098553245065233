"""The data stage of the comparison: test sets of the size that the scale asks for and, where it trains from nothing, its models.

    OUT/data/test/<set>.jsonl            the first `test_rows` rows of every set that DATA holds
    OUT/data/student, OUT/data/teacher   random models of the scale's sizes, with TOKENIZER or one made for the data

The folder appears at once, when all of it is there.
"""

from __future__ import annotations

import argparse
import os
import sys
from itertools import islice
from pathlib import Path

from megakd.errors import quiet_pipe
from megakd.planning.scale import model_of, read_scale

TEST_SETS = {  # as MiniLLM publishes them
    "dolly": "dolly/valid.jsonl",
    "self-inst": "self-inst/valid.jsonl",
    "vicuna": "vicuna/valid.jsonl",
    "s-ni": "sinst/11_/valid.jsonl",
    "un-ni": "uinst/11_/valid.jsonl",
}
NEEDED = ("dolly/train.jsonl", "dolly/dev.jsonl", "dolly/valid.jsonl")


def main() -> None:
    args = parse_args()
    scale = scale_for_new(args)
    unfinished = args.out.with_name(args.out.name + ".unfinished")
    copy_tests(args.data, unfinished / "test", scale["test_rows"])
    if "vocab_size" in scale:
        make_models(unfinished, scale, args.data / "dolly/train.jsonl")
    os.replace(unfinished, args.out)


def scale_for_new(args: argparse.Namespace) -> dict:
    """The scale's settings. Exits with one line where --data is not whole, or --out is there already."""
    check_data(args.data)
    if args.out.exists():
        sys.exit(f"error: --out {args.out}: is there already; give another folder")
    return read_scale(args.configs)


def check_data(data: Path) -> None:
    """Exits with one line where a file that every scale needs is missing."""
    for name in NEEDED:
        if not (data / name).is_file():
            sys.exit(f"error: DATA={data} holds no {name}; it needs MiniLLM's {', '.join(NEEDED)}")


def copy_tests(data: Path, folder: Path, rows: int) -> None:
    """The first rows of each set at hand."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in TEST_SETS.items():
        if (data / file).is_file():
            with (data / file).open(encoding="utf-8") as lines:
                (folder / f"{name}.jsonl").write_text("".join(islice(lines, rows)), encoding="utf-8")
        else:
            print(f"{name}: DATA={data} holds no {file}; the comparison goes without it")


def make_models(folder: Path, scale: dict, train_file: Path) -> None:
    """Untrained models as ordinary Hugging Face folders."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = open_tokenizer(scale["vocab_size"], train_file)
    for name in ("teacher", "student"):
        config = model_of(scale | {"vocab_size": len(tokenizer)}, name)
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{name}: {model.num_parameters():,} parameters, {len(tokenizer):,} ids")


def open_tokenizer(vocab_size: int, train_file: Path):
    """That of the folder TOKENIZER, or a byte-level BPE trained on the training rows."""
    from megakd.data.rows import read_rows
    from megakd.data.tokenizer import load_tokenizer

    sys.path.append(str(Path(__file__).parents[1]))
    from train_tokenizer import train_tokenizer

    if folder := os.environ.get("TOKENIZER"):
        return load_tokenizer(folder)
    return train_tokenizer([row.prompt + row.references[0] for row in read_rows(train_file)], vocab_size=vocab_size)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, help="folder of the scale, with scale.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder with MiniLLM's data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
