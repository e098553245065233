"""Train by SFT, KD, SeqKD, DistiLLM, MiniLLM, PromptKD or response priming, from Hugging Face folders to a Hugging Face folder.

    torchrun --nproc_per_node N scripts/pretrain_kd.py --method promptkd --model STUDENT --teacher-model TEACHER ...

Without torchrun the same line is one rank. --help lists the flags.
"""

import sys

from megakd.config import parse
from megakd.errors import told_in_one_line


def main() -> None:
    config = parse(sys.argv[1:])  # before torch is imported: --help and mistakes answer at once
    going_on = f"interrupted; the same command continues {config.output.save} after its last checkpoint (--save-interval)"
    with told_in_one_line(interrupted=going_on):
        from megakd.dry_run import dry_run
        from megakd.runtime.initialize import process_group_closed_at_exit
        from megakd.runtime.stop import listen
        from megakd.trainer import train

        listen([config.running.exit_signal])
        with process_group_closed_at_exit():
            dry_run(config) if config.preview.dry_run else train(config)


if __name__ == "__main__":
    main()
