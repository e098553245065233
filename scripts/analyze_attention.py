"""Where the heads of a base model and of its distilled students look: entropy, and mass on the question's numbers.

    python scripts/analyze_attention.py --model base=BASE kd=RUN/hf --data gsm8k/test.jsonl --save OUT

--help lists the flags; docs/evaluation.md shows what comes out.
"""

import sys

from megakd.config import AttentionConfig, parse
from megakd.errors import told_in_one_line


def main() -> None:
    config = parse(sys.argv[1:], AttentionConfig, program="analyze_attention.py")  # before torch is imported
    with told_in_one_line():
        from megakd.evaluation.attention import analyze_attention

        analyze_attention(config)


if __name__ == "__main__":
    main()
