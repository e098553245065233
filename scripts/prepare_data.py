"""Writes a small instruction data set and a tokenizer for it.

    python scripts/prepare_data.py --out data/tasks

leaves train.jsonl, valid.jsonl and test.jsonl (no prompt in two of them) and tokenizer/, a Hugging Face folder.
train_few.jsonl holds the first rows of train.jsonl: with few answers to learn from, a student gains by learning from its
teacher on the other prompts.
"""

import argparse
import json
from pathlib import Path

from tasks import make_rows

from megakd.errors import file_errors, quiet_pipe, told_in_one_line
from megakd.reporting.own_folder import OwnFolder, write_text


def main() -> None:
    args = parse_args()
    with told_in_one_line():
        prepare(args)


def prepare(args: argparse.Namespace) -> None:
    """Fill --out.

    Raises:
        UserError: it is somebody else's folder, or cannot be written.
    """
    folder = OwnFolder(args.out, "prepare_data.py", flag="--out")
    folder.check(is_older=lambda path: all((path / name).exists() for name in ("train_few.jsonl", "test.jsonl", "tokenizer")))
    folder.claim()
    sizes = {"train": args.num_train, "valid": args.num_valid, "test": args.num_test}
    rows = make_rows(sum(sizes.values()), seed=args.seed)
    first = 0
    for split, size in sizes.items():
        write_jsonl(args.out / f"{split}.jsonl", rows[first : first + size])
        first += size
    write_jsonl(args.out / "train_few.jsonl", rows[: min(args.num_few, args.num_train)])

    from train_tokenizer import train_tokenizer  # transformers takes seconds to import, --help none

    tokenizer = train_tokenizer([row["prompt"] + row["response"] for row in rows[: args.num_train]])
    with file_errors(args.out / "tokenizer"):
        tokenizer.save_pretrained(args.out / "tokenizer")
    print(f"{args.out}: {', '.join(f'{size} {split}' for split, size in sizes.items())} rows; tokenizer of {len(tokenizer)} ids")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=home, required=True, help="folder to write")
    for split, default in {"train": 20000, "valid": 500, "test": 500}.items():
        parser.add_argument(f"--num-{split}", type=positive, default=default, help=f"rows of {split}.jsonl (default {default})")
    parser.add_argument("--num-few", type=positive, default=600, help="rows of train_few.jsonl (default 600)")
    parser.add_argument("--seed", type=int, default=1234, help="same seed, same data (default 1234)")
    with quiet_pipe():
        return parser.parse_args()


def home(text: str) -> Path:
    """For argparse's `type`: a path, in which no shell has replaced the `~` of `--out=~/data`."""
    return Path(text).expanduser()


def positive(text: str) -> int:
    """For argparse's `type`: a number of rows, 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of rows; use 1 or more")
    return number


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    """One row a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
