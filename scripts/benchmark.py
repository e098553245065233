"""One PromptKD iteration taken apart: seconds by part, tokens/s, MFU, peak memory, padding; with --baseline hf beside the reference's.

    python scripts/benchmark.py --preset gpt2-small-cpu --baseline hf --data dolly/train.jsonl --tokenizer gpt2
    torchrun --nproc_per_node 2 scripts/benchmark.py --tensor-model-parallel-size 2

Models have random weights. The systems' losses are compared first: what is wrong is not timed. --help lists the flags.
"""

import sys
from pathlib import Path

from megakd.config import BenchmarkConfig, parse
from megakd.errors import told_in_one_line

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def main() -> None:
    config = parse(sys.argv[1:], BenchmarkConfig, program="benchmark.py")
    with told_in_one_line():
        from megakd_benchmarks.run import run  # seconds to import, --help none

        from megakd.runtime.initialize import process_group_closed_at_exit

        with process_group_closed_at_exit():
            run(config)


if __name__ == "__main__":
    main()
