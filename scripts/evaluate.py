"""Score a model on data sets: Rouge-L, exact match, LM loss; beside a teacher also held-out KL and exposure bias; GSM8K.

    torchrun --nproc_per_node N scripts/evaluate.py --model MODEL --data dolly=dolly.jsonl vicuna=vicuna.jsonl --save OUT

Without torchrun the same line is one rank. --help lists the flags.
"""

import sys

from megakd.config import EvaluateConfig, parse
from megakd.errors import told_in_one_line


def main() -> None:
    config = parse(sys.argv[1:], EvaluateConfig, program="evaluate.py")  # before torch is imported
    again = "interrupted; scores come with the last answer, so give the same command again"
    with told_in_one_line(interrupted=again):
        from megakd.evaluation.evaluator import evaluate
        from megakd.runtime.initialize import process_group_closed_at_exit

        with process_group_closed_at_exit():
            evaluate(config)


if __name__ == "__main__":
    main()
