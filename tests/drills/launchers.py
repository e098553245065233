"""Ranks and launchers that die and come back: on one machine, on fewer ranks, and on two machines with addresses of their own."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from drill import Drill
from job import Job

from megakd.checkpointing.native import read_latest

LONG = {"train-iters": 1200, "save-interval": 40, "eval-interval": 300}
MIDDLE = {"train-iters": 80, "save-interval": 5, "eval-interval": 40}
ACROSS = {"TP2": {"tp": 2}, "DP2": {}}
ADDRESSES = ("10.213.0.1", "10.213.0.2")
PATIENT = "keep_alive_max_attempt=6"  # launchers on busy cores are late


def drill_restarts(drill: Drill) -> None:
    """torchrun and our launcher start killed ranks again."""
    reference = drill.job("reference", "sft", LONG).start()
    drill.tell("sft DP2, unbroken", reference.end(600) == 0)
    for launcher in ("torchrun", "megakd.launch"):
        job = drill.job("restarted", "sft", LONG, launcher=launcher, options=("--nproc_per_node", "2", "--max-restarts", "3")).start()
        for who in ("1", "0", "1"):
            job.wait_for_iteration(max(job.iteration, LONG["save-interval"]) + 1)  # there is a checkpoint to go on from
            attempts = job.attempts
            job.kill(who)
            job.wait_for_attempt(attempts + 1)
        drill.tell(f"{launcher} --max-restarts, three ranks killed", job.end(600) == 0)
        drill.compare(launcher, job, reference)


def drill_elastic(drill: Drill) -> None:
    """DP2 over two launchers, of which one is killed: it goes on alone, and is joined again."""
    flags = {"train-iters": 100000, "save-interval": 10, "eval-interval": 1000}
    host, guest = _two_launchers(drill, "elastic", flags, nodes="1:2", conf=f"last_call_timeout=5,{PATIENT}")
    try:
        host.start(), guest.start()
        host.wait_for_iteration(12)
        guest.kill("machine")
        host.wait_for_attempt(1)
        host.wait_for_iteration(host.iteration + 10)
        drill.tell("DP2, one launcher killed: goes on as DP1", True, f"iteration {host.iteration}")
        guest.start()
        host.wait_for_attempt(2)
        host.wait_for_iteration(host.iteration + 10)
        drill.tell("started again: goes on as DP2", True, f"iteration {host.iteration}")
        host.process.send_signal(signal.SIGTERM)
        codes = host.end(120), guest.end(120)
        drill.tell("told to stop", codes == (0, 0), f"exit codes {codes}, saved {read_latest(host.save / 'checkpoints')}")
    finally:
        host.clean_up(), guest.clean_up()


def drill_machines(drill: Drill) -> None:
    """Two launchers on two machines, TP2 and DP2 across them: one machine is lost and comes back, then a rank of the other is killed."""
    with two_machines() as (places, refused):
        where = "two network namespaces" if places else f"one machine's loopback ({refused})"
        for layout, flags in ACROSS.items():
            reference = drill.job("reference", "sft", MIDDLE | flags).start()
            drill.tell(f"sft {layout} under one launcher, unbroken", reference.end(600) == 0)
            host, guest = _two_launchers(drill, "machines", MIDDLE | flags, nodes="2", conf=PATIENT, places=places)
            try:
                host.start(), guest.start()
                host.wait_for_iteration(8)
                guest.kill("machine")
                guest.start()
                host.wait_for_attempt(1)
                host.wait_for_iteration(host.iteration + 8)
                host.kill("0")
                host.wait_for_attempt(2)
                codes = host.end(600), guest.end(600)
            finally:
                host.clean_up(), guest.clean_up()
            drill.tell(f"{layout} over {where}: a machine lost and back, then a rank of the other", codes == (0, 0), f"exit codes {codes}")
            drill.compare(layout, host, reference)


def _two_launchers(drill: Drill, save: str, flags: dict, *, nodes: str, conf: str, places: tuple = ()) -> tuple[Job, Job]:
    """The first keeps the store; one rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    addresses = ADDRESSES if places else ("127.0.0.1", "127.0.0.1")
    jobs = []
    for number, address in enumerate(addresses):
        meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{addresses[0]}:{port}", "--rdzv_id", save, "--local_addr", address]
        options = ("--nnodes", nodes, "--nproc_per_node", "1", "--max-restarts", "5", *meeting, "--rdzv_conf", f"{conf},is_host={1 - number}")
        where = {"before": places[number], "environment": {"GLOO_SOCKET_IFNAME": f"megakd{number}"}} if places else {}
        jobs.append(drill.job(save, "sft", flags, options=options, **where))
    return jobs[0], jobs[1]


@contextmanager
def two_machines() -> Iterator[tuple[tuple[list[str], ...], str]]:
    """How a command is started in each of two network namespaces, which a pair of veth devices joins; nothing, and the command that was
    refused, where this machine allows none."""
    names = ("megakd-drill-0", "megakd-drill-1")
    steps = [f"ip netns add {name}" for name in names]
    steps += ["ip link add megakd0 type veth peer name megakd1"]
    for number, name in enumerate(names):
        steps += [f"ip link set megakd{number} netns {name}", f"ip -n {name} addr add {ADDRESSES[number]}/24 dev megakd{number}"]
        steps += [f"ip -n {name} link set megakd{number} up", f"ip -n {name} link set lo up"]
    try:
        refused = next(filter(None, map(_refused, steps)), "")
        yield (() if refused else tuple(["ip", "netns", "exec", name] for name in names)), refused
    finally:
        for name in names:
            _refused(f"ip netns del {name}")


def _refused(command: str) -> str:
    """What the system says against it, if anything."""
    try:
        done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"`{command}`: {error.strerror}"
    return f"`{command}`: {done.stderr.strip()}" if done.returncode else ""
