"""Of `ranks.simulate`, the process that forks: python -m megakd.simulation FOLDER"""

import os
import sys
from pathlib import Path

from megakd.errors import told_in_one_line
from megakd.simulation import shim
from megakd.simulation.ranks import simulate_folder


def main() -> None:
    """Its argument is the folder with what is asked for."""
    with told_in_one_line():
        shim.load()
        simulate_folder(Path(sys.argv[1]), processes=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
