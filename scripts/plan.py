"""What a run will need: GiB a card by part of the iteration, messages, a time, and which layouts fit. From config.json alone.

    python scripts/plan.py --method promptkd --model STUDENT --teacher-model TEACHER --tp 4 --gpus 8 --gpu h100 --micro-batch-size 16
    python scripts/plan.py --method promptkd --model STUDENT --teacher-model TEACHER --gpus 8 --rank-layouts --out plan

Nothing runs on a GPU: ranks are simulated (docs/gpu.md). It takes the flags of pretrain_kd.py; --help lists them.
"""

import sys

from megakd.config import parse
from megakd.config.plan import PlanConfig
from megakd.errors import told_in_one_line


def main() -> None:
    config = parse(sys.argv[1:], PlanConfig, program="plan.py")
    with told_in_one_line():
        from megakd.planning.page import page, write  # seconds to import, --help none
        from megakd.planning.plan import plans

        found = plans(config)
        print(page(config, found))
        if config.plan.out:
            write(config, found)


if __name__ == "__main__":
    main()
