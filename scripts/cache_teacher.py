"""Write what a teacher says of every response of the data, once: training with --teacher-cache then loads no teacher.

    torchrun --nproc_per_node N scripts/cache_teacher.py --teacher-model TEACHER --train-data train.jsonl --save targets

Cut off, the same command continues. Without torchrun the same line is one rank. --help lists the flags.
"""

import sys

from megakd.config import CacheConfig, parse
from megakd.errors import told_in_one_line


def main() -> None:
    config = parse(sys.argv[1:], CacheConfig, program="cache_teacher.py")  # before torch is imported
    going_on = f"interrupted; the same command goes on with {config.save}"
    with told_in_one_line(interrupted=going_on):
        from megakd.runtime.initialize import process_group_closed_at_exit
        from megakd.teachers.caching import cache_teacher

        with process_group_closed_at_exit():
            cache_teacher(config)


if __name__ == "__main__":
    main()
