"""torchrun, for jobs that are stopped, restarted and read about: the same arguments, another agent.

    python -m megakd.launch --nproc_per_node 8 scripts/pretrain_kd.py ...

torchrun gives its ranks 30 seconds on SIGTERM or Ctrl-C, and ends with a traceback and exit code 1 though they have saved; this agent hands
the signal on and waits for them. torchrun starts again what a user has to mend (exit code 2); this agent does not. A machine that was lost
may join again, which torchrun's first machine does not notice. What torchrun prints of a rank that has failed goes into a file; the
reader's last lines are those of the ranks.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousHandler
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.launcher import api

from megakd.errors import file_errors, told_in_one_line

USERS_MISTAKE = 2  # errors.fail's exit code
HANDED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
REPORT = f"megakd_launch_{os.getuid()}.log"  # a machine's folder for temporary files has other users, too


class Agent(LocalElasticAgent):
    """Hands signals on to its ranks, and restarts them unless they were told to stop or somebody has to mend something."""

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        tell_address_anew(worker_group.spec.rdzv_handler)
        self._pcontext = None  # those of an earlier round have ended
        super()._rendezvous(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict:
        started = super()._start_workers(worker_group)  # takes the signals for itself
        for name in HANDED_ON:
            signal.signal(getattr(signal, name), self._hand_on)
        return started

    def _hand_on(self, number: int, frame: object) -> None:
        self._remaining_restarts = 0
        if self._pcontext is None:  # it waits for other launchers, maybe minutes, and there is nothing to save
            sys.exit(128 + number)
        for pid in self._pcontext.pids().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it has ended, and is asked for in a moment

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED and any(failure.exitcode == USERS_MISTAKE for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or that of the rank that failed first."""
    api.LocalElasticAgent = Agent  # the class that the launcher makes an agent of
    args = torchrun.parse_args(arguments)
    report = Path(args.log_dir or tempfile.gettempdir()) / REPORT
    with told_in_one_line(), file_errors(report, way_out="give --log-dir a folder that can be written"):
        with_file(logging.getLogger("torch.distributed.elastic"), report)
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        with report.open("a") as file:
            file.write(f"{error}\n")
        return told(rank, failure, report)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def tell_address_anew(handler: RendezvousHandler) -> None:
    """Let the first machine say in the coming round, too, where its store is. torch says it in the first round alone, and a launcher that
    joins a later one waits for it there until both end (`DynamicRendezvousHandler.next_rendezvous`)."""
    if isinstance(handler, DynamicRendezvousHandler):
        handler._bootstrap_store_info = None


def with_file(logger: logging.Logger, file: Path) -> None:
    """What the agent notes of itself goes into a file in place of the terminal."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.propagate = False


def told(rank: int, failure, report: Path) -> int:
    """One line of a rank that could not tell itself; its exit code."""
    if failure.exitcode != USERS_MISTAKE:
        how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
        print(f"error: rank {rank} {how}; the launcher's report is {report}", file=sys.stderr, flush=True)
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


if __name__ == "__main__":
    sys.exit(main())
