"""Let a model answer the prompts of a jsonl file, into a jsonl file that can be trained on as it is (SeqKD).

    torchrun --nproc_per_node N scripts/generate.py --model TEACHER --data train.jsonl --save answers.jsonl

Cut off, the same command continues. Without torchrun the same line is one rank. --help lists the flags.
"""

import sys

from megakd.config import GenerateConfig, parse
from megakd.errors import told_in_one_line


def main() -> None:
    config = parse(sys.argv[1:], GenerateConfig, program="generate.py")  # before torch is imported
    going_on = f"interrupted; the same command continues {config.save}"
    with told_in_one_line(interrupted=going_on):
        from megakd.generation.write_responses import write_responses
        from megakd.runtime.initialize import process_group_closed_at_exit

        with process_group_closed_at_exit():
            write_responses(config)


if __name__ == "__main__":
    main()
