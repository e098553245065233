"""Do the tests notice? Each line of table.py is changed in a copy of the tree, and the tests named beside it must then fail.

    python tests/mutants/run.py [WORD ...] [--processes 2] [--seconds 240]

A WORD keeps the mutants whose file, old or new text or tests hold it. Tests must pass on the unchanged copy first. Each run imports
megakd from its copy, which is checked; text that is no longer there, and tests that are not found, end the run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTEST = """
import sys
import megakd, megakd_kernels, pytest
folder, sys.executable, *options = sys.argv[1:]  # what a test starts is a python of its own
all(module.__file__.startswith(folder) for module in (megakd, megakd_kernels)) or sys.exit(3)
sys.exit(pytest.main(options))
"""
SURVIVED, KILLED, HUNG = "survived", "killed", "killed (hangs)"


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests")]
    import warm_python
    from table import MUTANTS

    args = parse_args()
    chosen = [mutant for mutant in MUTANTS if not args.words or any(word in " ".join(mutant) for word in args.words)]
    started = time.perf_counter()
    work = [
        item for tests in sorted({mutant.tests for mutant in chosen})
        for item in (Work(tests), *(Work(tests, mutant) for mutant in chosen if mutant.tests == tests))
    ]  # fmt: skip
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by a library as it is imported, which is before conftest.py says so
    with tempfile.TemporaryDirectory() as folder:
        python, _server = warm_python.start(Path(folder))
        do(work, [copy_of_the_tree(Path(folder) / str(number)) for number in range(args.processes)], args.seconds, python)
    results = [item.outcome for item in work if item.mutant]
    killed = len(results) - results.count(SURVIVED)
    print(f"\n{killed} of {len(results)} mutants killed ({killed / max(1, len(results)):.1%}), {time.perf_counter() - started:.0f} s")
    if broken := [item.tests for item in work if not item.mutant and item.outcome != SURVIVED]:
        sys.exit("these tests fail without a mutation, and so show nothing:\n" + "\n".join(broken))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only the mutants that hold one of these (default: all)")
    parser.add_argument("--processes", type=int, default=2, help="mutants at once (default: 2)")
    parser.add_argument("--seconds", type=float, default=240, help="after which a mutant counts as hanging (default: 240)")
    return parser.parse_args()


def copy_of_the_tree(folder: Path) -> Path:
    """What git would keep of the working tree, changes among it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@dataclass
class Work:
    """Tests to run on one mutant, or on the unchanged tree."""

    tests: str
    mutant: Any = None
    outcome: str = ""

    def start(self, folder: Path, python: Path) -> None:
        """Change the copy, and begin."""
        self.folder, self.began = folder, time.perf_counter()
        if self.mutant:
            file = folder / self.mutant.file
            text = file.read_text()
            assert text.count(self.mutant.old) == 1, f"{self.mutant.file} holds {self.mutant.old!r} {text.count(self.mutant.old)} times"
            file.write_text(text.replace(self.mutant.old, self.mutant.new))
            self.restore = lambda: file.write_text(text)
        self.process = run_tests(folder, self.tests, python)

    def has_ended(self, seconds: float) -> bool:
        """Whether it is over, be it by force; the copy is then as it was."""
        code = self.process.poll()
        hangs = code is None and time.perf_counter() - self.began > seconds
        if code is None and not hangs:
            return False
        if hangs:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.mutant:
            self.restore()
        assert hangs or (code in (0, 1, 2) if self.mutant else code in (0, 1)), f"pytest ended with {code}: {self.tests}, {self.mutant}"
        self.outcome = HUNG if hangs else KILLED if code else SURVIVED
        what = f"{self.mutant.file}: {self.mutant.new.strip()[:100]}" if self.mutant else f"unchanged: {self.tests[:100]}"
        word = self.outcome if self.mutant or self.outcome != SURVIVED else "passes"
        print(f"{word:15} {time.perf_counter() - self.began:4.0f} s  {what}", flush=True)
        return True


def do(work: list[Work], copies: list[Path], seconds: float, python: Path) -> None:
    """All of it, one piece a copy at a time."""
    waiting, running = list(work), []
    while waiting or running:
        running = [item for item in running if not item.has_ended(seconds)]
        for folder in copies:
            if waiting and all(item.folder != folder for item in running):
                running.append(waiting.pop(0))
                running[-1].start(folder, python)
        time.sleep(0.1)


def run_tests(folder: Path, tests: str, python: Path) -> subprocess.Popen:
    """pytest on the copy, by a python that holds the libraries already, in a process group of its own; its exit code is 3 where megakd would come from elsewhere."""
    paths = os.pathsep.join([str(folder), str(folder / "kernels")])
    data = os.environ.get("MEGAKD_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MEGAKD_TEST_DATA": data}
    options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "--rootdir", str(folder), *tests.split("|")]
    return subprocess.Popen(
        [python, "-c", PYTEST, str(folder), sys.executable, *options],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


if __name__ == "__main__":
    main()
