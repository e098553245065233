"""Ranks that were started again meet each other, and nobody who has died."""

from __future__ import annotations

import datetime
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler, RendezvousTimeout

from megakd import launch
from megakd.errors import LostRankError
from megakd.launch import Agent, tell_address_anew
from megakd.runtime.meeting import be_welcomed, welcome_all

SOON = datetime.timedelta(seconds=10)


def attempt(store, size: int) -> str:
    """All ranks of one attempt, in any order; the name that they agree on."""
    with ThreadPoolExecutor(size) as ranks:
        others = [ranks.submit(be_welcomed, store, rank) for rank in range(1, size)]
        names = {rank.result() for rank in [ranks.submit(welcome_all, store, size, SOON), *others]}
    assert len(names) == 1
    return names.pop()


@pytest.mark.parametrize("sizes", [(3, 3, 3), (4, 2), (1, 2)])
def test_every_attempt_has_a_name_of_its_own_in_a_store_that_outlives_it(sizes):
    store = dist.HashStore()
    names = [attempt(store, size) for size in sizes]
    assert len(set(names)) == len(sizes)


def test_a_rank_that_died_before_it_was_welcomed_is_not_taken_for_one_that_lives():
    store = dist.HashStore()
    store.set("hello/1", "of a rank that has died")
    with pytest.raises(LostRankError, match=r"of 2 ranks \[1\] have not come"):
        welcome_all(store, 2, datetime.timedelta(seconds=0.2))
    assert attempt(store, 2)


def next_round(handler) -> tuple[int, int, int]:
    """What a launcher does: its number, how many there are, and the port of the store of the first."""
    tell_address_anew(handler)
    found = handler.next_rendezvous()
    return found.rank, found.world_size, int(found.bootstrap_store_info.master_port)


def test_a_launcher_joins_a_round_that_is_not_the_first_of_the_one_that_stayed():
    """torch's alone would wait for an address until its store gives up, here after five seconds."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=5))
    timeouts = RendezvousTimeout(join=datetime.timedelta(seconds=30), last_call=datetime.timedelta(seconds=1))
    first, second = (
        DynamicRendezvousHandler.from_backend(
            "job", store, C10dRendezvousBackend(store, "job"), 1, 2, local_addr="127.0.0.1", timeout=timeouts, keep_alive_interval=60
        )
        for store in (server, dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=datetime.timedelta(seconds=5)))
    )
    assert next_round(first)[:2] == (0, 1)
    with ThreadPoolExecutor(2) as launchers:
        joined = launchers.submit(next_round, second)
        while not first.num_nodes_waiting():
            assert not joined.done(), "it made a round of its own"
            time.sleep(0.05)
        stayed = launchers.submit(next_round, first)
        (stayed_rank, size, port), (rank, same_size, same_port) = stayed.result(), joined.result()
    assert {stayed_rank, rank} == {0, 1} and size == same_size == 2 and port == same_port
    first.shutdown(), second.shutdown()


def test_a_launcher_that_is_told_to_stop_while_it_waits_for_others_ends_at_once():
    """Its ranks of the round before have ended: nobody is there to hand the signal on to."""
    agent, before = object.__new__(Agent), signal.getsignal(signal.SIGTERM)
    agent._remaining_restarts, agent._pcontext, agent.record_duration = 3, SimpleNamespace(pids=dict), lambda what: nullcontext()
    waits = SimpleNamespace(next_rendezvous=lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(1)))
    signal.signal(signal.SIGTERM, agent._hand_on)
    try:
        with pytest.raises(SystemExit) as ended:
            agent._rendezvous(SimpleNamespace(spec=SimpleNamespace(rdzv_handler=waits)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_launchers_report_is_its_users_own_and_one_that_cannot_be_written_is_one_line(capsys):
    assert str(os.getuid()) in launch.REPORT
    with pytest.raises(SystemExit) as ended:
        launch.main(["--log-dir", "/proc/nowhere", "--nproc_per_node", "1", "train.py"])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(f"error: /proc/nowhere/{launch.REPORT}: ")
    assert line.endswith("; give --log-dir a folder that can be written")
