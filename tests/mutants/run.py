"""Do the tests notice? Each line of table.py is changed in a copy of the tree, and the tests named beside it must then fail.

    python tests/mutants/run.py [WORD ...] [--processes 2] [--seconds 240]

A WORD keeps the mutants whose file, old or new text holds it. Tests must pass on the unchanged copy first. torch, megatron-core and
transformers are imported once; every mutant is a fork that imports megakd from its copy, which is checked.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
IMPORTED_ONCE = ("torch", "numpy", "transformers", "megatron.core.models.gpt", "megatron.core.optimizer", "megatron.core.dist_checkpointing",
                 "tyro", "yaml", "pytest", "rouge_score.rouge_scorer")  # fmt: skip
SURVIVED, KILLED, HUNG = "survived", "killed", "killed (hangs)"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from table import MUTANTS

    args = parse_args()
    chosen = [mutant for mutant in MUTANTS if not args.words or any(word in " ".join(mutant) for word in args.words)]
    for name in IMPORTED_ONCE:
        __import__(name)
    sys.modules["torch"].set_num_threads(1)
    started = time.perf_counter()
    work = [Work(tests) for tests in sorted({mutant.tests for mutant in chosen})] + [Work(mutant.tests, mutant) for mutant in chosen]
    with tempfile.TemporaryDirectory() as folder:
        do(work, [copy_of_the_tree(Path(folder) / str(number)) for number in range(args.processes)], args.seconds)
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

    def start(self, folder: Path) -> None:
        """Change the copy, and fork."""
        self.folder, self.began = folder, time.perf_counter()
        if self.mutant:
            file = folder / self.mutant.file
            text = file.read_text()
            assert text.count(self.mutant.old) == 1, f"{self.mutant.file} holds {self.mutant.old!r} {text.count(self.mutant.old)} times"
            file.write_text(text.replace(self.mutant.old, self.mutant.new))
        self.process = multiprocessing.get_context("fork").Process(target=_child, args=(folder, self.tests))
        self.process.start()

    def has_ended(self, seconds: float) -> bool:
        """Whether it is over, be it by force; the copy is then as it was."""
        hangs = self.process.is_alive() and time.perf_counter() - self.began > seconds
        if self.process.is_alive() and not hangs:
            return False
        if hangs:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        if self.mutant:
            shutil.copyfile(ROOT / self.mutant.file, self.folder / self.mutant.file)
        assert hangs or self.process.exitcode in (0, 1), f"pytest ended with {self.process.exitcode} on {self.tests}: {self.mutant}"
        self.outcome = HUNG if hangs else KILLED if self.process.exitcode else SURVIVED
        what = f"{self.mutant.file}: {self.mutant.new.strip()[:100]}" if self.mutant else f"unchanged: {self.tests[:100]}"
        word = self.outcome if self.mutant or self.outcome != SURVIVED else "passes"
        print(f"{word:15} {time.perf_counter() - self.began:4.0f} s  {what}", flush=True)
        return True


def do(work: list[Work], copies: list[Path], seconds: float) -> None:
    """All of it, one piece a copy at a time. Forks come from this thread alone."""
    waiting, running = list(work), []
    while waiting or running:
        running = [item for item in running if not item.has_ended(seconds)]
        for folder in copies:
            if waiting and all(item.folder != folder for item in running):
                running.append(waiting.pop(0))
                running[-1].start(folder)
        time.sleep(0.1)


def _child(folder: Path, tests: str) -> None:
    os.setpgrp()
    os.chdir(folder)
    paths = [str(folder), str(folder / "kernels")]
    sys.path[:0] = paths
    sys.dont_write_bytecode = True
    sys.argv[:] = ["pytest"]
    data = os.environ.get("MEGAKD_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    os.environ |= {"PYTHONPATH": ":".join(paths), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "MEGAKD_TEST_DATA": data}
    import pytest

    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *tests.split("|")])
        if code == 0:
            import megakd

            assert Path(megakd.__file__).is_relative_to(folder), f"{megakd.__file__} is not the mutated copy"
    if code not in (0, 1):
        sys.__stderr__.write(said.getvalue()[-2000:])
    os._exit(int(code))


if __name__ == "__main__":
    main()
