"""The long drill, `make drill`, or some of it: run.py kills signals.

Every case is told in one line as it ends; what differs from the unbroken run, is lost or hangs is counted, and the exit code says whether anything was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import drill
import folders
import kills
import launchers
from test_trainer import write_inputs

DRILLS = {
    name.removeprefix("drill_"): work
    for room in (kills, folders, launchers) for name, work in vars(room).items() if name.startswith("drill_")
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drills", nargs="*", default=list(DRILLS), help=f"of {', '.join(DRILLS)}")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=3, help="cases of `kills` that are at work together; more than cores, for a job often waits")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="megakd-drill-") as folder:
        lab = drill.Drill(write_inputs(Path(folder)), args.kills, args.seed, args.at_once)
        for name in args.drills:
            begun = time.monotonic()
            try:
                DRILLS[name](lab)
            except AssertionError as error:
                lab.tell(name, False, str(error))
            print(f"      {name}: {time.monotonic() - begun:.0f} s", flush=True)
    print(f"{lab.bad} did not hold" if lab.bad else "all held", flush=True)
    return int(lab.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
