"""Peak bytes by part of every rank of every case, as they are now: golden.json. To be looked at before it is committed.

    python tests/gpu_simulation/golden.py [METHOD ...]        those methods alone, the others stay
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py

from jobs import LAYOUTS, job

from megakd.config import METHODS
from megakd.simulation.ranks import simulate

FILE = Path(__file__).with_name("golden.json")


def main() -> None:
    ranks = [(f"{method}, {layout}", rank) for method in sys.argv[1:] or METHODS for layout in LAYOUTS for rank in job(method, layout)]
    golden: dict[str, list[dict[str, int]]] = {}
    for (case, _), record in zip(ranks, simulate([rank for _, rank in ranks])):
        golden.setdefault(case, []).append(record.peaks)
    FILE.write_text(json.dumps(json.loads(FILE.read_text()) | golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
