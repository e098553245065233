"""Train by any of the methods (SFT, KD, SeqKD, DistiLLM, MiniLLM, PromptKD), from Hugging Face folders to a Hugging Face folder.

    torchrun --nproc_per_node N scripts/pretrain_kd.py --method promptkd --model STUDENT --teacher-model TEACHER ...

Without torchrun the same line is one rank. --help lists the flags.
"""

import sys

from megakd.config import fail, parse


def main() -> None:
    config = parse(sys.argv[1:])  # before torch is imported: --help and mistakes answer at once
    from megakd.runtime.initialize import process_group_closed_at_exit
    from megakd.trainer import train

    try:
        with process_group_closed_at_exit():
            train(config)
    except ValueError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"interrupted; the same command continues {config.output.save} after its last checkpoint (--save-interval)")


if __name__ == "__main__":
    main()
