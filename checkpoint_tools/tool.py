"""What the three tools share: flags in other projects' spellings too, errors in one line, nothing heavy before it is needed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # a clone works without installation

SPELLINGS = {  # Megatron-LM's, PromptKD's, MiniLLM's, Megatron-Bridge's -> ours
    "--tp": "--tensor-model-parallel-size",
    "--target-tensor-parallel-size": "--tensor-model-parallel-size",
    "--target-mp-size": "--tensor-model-parallel-size",
    "--pp": "--pipeline-model-parallel-size",
    "--target-pipeline-parallel-size": "--pipeline-model-parallel-size",
    "--load-dir": "--load",
    "--save-dir": "--save",
    "--output-path": "--save",
    "--exist-ok": "--force",
}
UNNEEDED = (
    "--model-type",
    "--source-mp-size",
    "--source-tensor-parallel-size",
    "--source-pipeline-parallel-size",
    "--loader",
    "--saver",
)
EPILOG = (
    "Underscores work like dashes, and so do --tp, --pp, --load-dir, --save-dir, --target-tensor-parallel-size, "
    "--target-pipeline-parallel-size, --target-mp-size, --output-path, --exist-ok. What old command lines say besides is in the "
    f"folder itself: {', '.join(UNNEEDED)} are accepted and not used."
)


class Parser(argparse.ArgumentParser):
    """A wrong flag is one line; `spellings` are this tool's own aliases, `needed` the flags of UNNEEDED that it has use for."""

    def __init__(self, description: str, spellings: dict[str, str], needed: Sequence[str] = ()):
        super().__init__(
            description=description, epilog=EPILOG, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )
        self.spellings = SPELLINGS | spellings
        self.unneeded = self.add_argument_group("accepted and not used")
        for flag in (flag for flag in UNNEEDED if flag not in needed):
            self.unneeded.add_argument(flag, help=argparse.SUPPRESS)

    def error(self, message: str):
        """One line instead of the whole usage, and argparse's exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")

    def parse(self) -> argparse.Namespace:
        """The command line, whose flags may have any of the spellings."""
        from megakd.errors import quiet_pipe

        with quiet_pipe():
            return self.parse_args([self._canonical(word) for word in sys.argv[1:]])

    def _canonical(self, word: str) -> str:
        if not word.startswith("--"):
            return word
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        return self.spellings.get(flag, flag) + equals + os.path.expanduser(value)  # no shell has seen the ~ of --save=~/out


def add_layout(parser: Parser) -> None:
    """--tensor-model-parallel-size and --pipeline-model-parallel-size, 1 by default."""
    layout = parser.add_argument_group("layout to write")
    layout.add_argument("--tensor-model-parallel-size", type=positive, default=1, metavar="TP", help="ranks that share one layer")
    layout.add_argument(
        "--pipeline-model-parallel-size", type=positive, default=1, metavar="PP", help="stages that follow each other"
    )


def add_safety(parser: Parser) -> None:
    """--no-verify and --force."""
    safety = parser.add_argument_group("safety")
    safety.add_argument("--no-verify", action="store_true", help="skip reading back and comparing every tensor bit for bit")
    safety.add_argument("--force", action="store_true", help="replace what --save already holds")


def positive(text: str) -> int:
    """For argparse's `type`: a whole number, 1 or more.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def run(parser: Parser, convert: Callable[[argparse.Namespace], Path]) -> None:
    """Parse, convert, say where the result is; whatever a user can cause ends in one line."""
    from megakd.errors import UserError

    args = parser.parse()
    try:
        print(f"wrote {convert(args)}")
    except UserError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was written\n")
