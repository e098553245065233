"""On-policy distillation by KL(q‖p) in one table: megakd's layouts beside transformers, Liger's chunked loss and TRL's trainer.

    pip install trl liger-kernel
    python scripts/benchmark_systems.py --data dolly/train.jsonl --tokenizer gpt2 --threads 2

Models have random weights and learn in every system; losses are compared first: what is wrong is not timed. --help lists the flags.
"""

import sys
from pathlib import Path

from megakd.config import SystemsConfig, parse
from megakd.errors import told_in_one_line

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))


def main() -> None:
    config = parse(sys.argv[1:], SystemsConfig, program="benchmark_systems.py")
    with told_in_one_line():
        from megakd_benchmarks.systems.run import run  # seconds to import, --help none

        run(config)


if __name__ == "__main__":
    main()
