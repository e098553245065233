"""The data stage of the comparison on a real model: MiniLLM's instructions as chats.

    OUT/train.jsonl, valid.jsonl      the first rows of Dolly's training and development set
    OUT/test/<set>.jsonl              the first rows of every test set that DATA holds
    OUT/test/wikitext.jsonl           long paragraphs of --wikitext: 32 words as they stand, and those that follow, for the loss alone

The folder appears at once, when all of it is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from prepare import scale_for_new

from megakd.checkpointing.publish import published
from megakd.errors import file_errors, quiet_pipe, told_in_one_line

TEST_SETS = {"dolly": "dolly/valid.jsonl", "self-inst": "self-inst/valid.jsonl", "vicuna": "vicuna/valid.jsonl"}
READ, LONG = 32, 200  # words: of a paragraph's beginning, and of a paragraph that no response of the scale reaches the end of


def main() -> None:
    args = parse_args()
    scale = scale_for_new(args)
    with told_in_one_line(), published(args.out) as folder:
        make(args, scale, folder)


def make(args: argparse.Namespace, scale: dict, folder: Path) -> None:
    """Every file."""
    (folder / "test").mkdir()
    for name, file, rows in (("train", "train", "train_rows"), ("valid", "dev", "valid_rows")):
        write(folder / f"{name}.jsonl", chats(args.data / f"dolly/{file}.jsonl"), scale[rows])
    for name, file in TEST_SETS.items():
        if (args.data / file).is_file():
            write(folder / "test" / f"{name}.jsonl", chats(args.data / file), scale["test_rows"])
    if args.wikitext:
        write(folder / "test" / "wikitext.jsonl", paragraphs(args.wikitext), scale["test_rows"])


def write(path: Path, rows: Iterator[dict], count: int) -> None:
    """The first of them, one JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in islice(rows, count)), encoding="utf-8")


def chats(file: Path) -> Iterator[dict]:
    """An instruction, with what it is about, and its answer as two turns."""
    with file_errors(file), file.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
            turns = [{"role": "user", "content": asked}]
            yield {"messages": turns, "response": row["output"]} if isinstance(row["output"], list) else answered(turns, row["output"])


def answered(turns: list[dict], answer: str) -> dict:
    """A chat with its last turn."""
    return {"messages": [*turns, {"role": "assistant", "content": answer}]}


def paragraphs(file: Path) -> Iterator[dict]:
    """Long ones; where they begin, and how they go on."""
    with file_errors(file, flag="--wikitext"), file.open(encoding="utf-8") as lines:
        for words in (line.strip().split(" ") for line in lines):
            if len(words) >= LONG:
                yield {"prompt": " ".join(words[:READ]), "response": " " + " ".join(words[READ:])}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, required=True, help="folder of the scale, with scale.yaml")
    parser.add_argument("--data", type=Path, required=True, help="folder with MiniLLM's data sets")
    parser.add_argument("--wikitext", type=Path, help="a text file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
