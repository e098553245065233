"""The student that MiniLLM and PromptKD begin with: of an SFT run's checkpoints the one with the lowest held-out loss.

It becomes an ordinary Hugging Face folder. How long an SFT student is trained for its own sake (20 epochs of Dolly for GPT-2) is
far too long for a beginning: its held-out loss rises after a few.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megakd.errors import quiet_pipe, told_in_one_line
from megakd.reporting.jsonl import read_jsonl


def main() -> None:
    args = parse_args()
    from megakd.checkpointing.export_hf import export_to_hf

    iteration, loss = best_checkpoint(args.run)
    print(f"{args.save}: iteration {iteration} of {args.run}, held-out loss {loss:.4f}")
    with told_in_one_line():
        export_to_hf(args.run / "checkpoints", args.save, iteration=iteration, force=False)


def best_checkpoint(run: Path) -> tuple[int, float]:
    """Iteration and held-out loss of the best checkpoint that is there; the last one always is.

    Raises:
        SystemExit: there is none, or none with a held-out loss.
    """
    saved = {int(folder.name.removeprefix("iter_")) for folder in (run / "checkpoints").glob("iter_*")}
    losses = {row["iteration"]: row["valid/lm_loss"] for row in read_jsonl(run / "metrics.jsonl") if "valid/lm_loss" in row}
    if not saved & losses.keys():
        sys.exit(f"error: --run {run}: no checkpoint whose held-out loss was logged; give the folder of an SFT run with --valid-data")
    return min(((i, losses[i]) for i in saved & losses.keys()), key=lambda pair: pair[1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="--save folder of an SFT run with --valid-data")
    parser.add_argument("--save", type=Path, required=True, help="Hugging Face folder to write")
    with quiet_pipe():
        return parser.parse_args()


if __name__ == "__main__":
    main()
