"""Where the ranks of one attempt meet: the launcher's store, under a prefix that no earlier attempt has used.

torchrun keeps one store through all its restarts, and torch's ranks write their addresses there under the same keys each time: a rank that
was started again finds those of ranks that have died, "connection refused". Nothing that the launcher tells a rank names the attempt on
every machine alike, so rank 0 names it, and the others make sure that what they read was written for them.

    rank r   hello/r = token            a new one, which nobody else has
    rank 0   welcome/token = attempt    to every token that it finds, until everybody has thanked: one of a dead rank is answered in vain
    rank r   thanks/attempt/r
"""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist

from megakd.errors import LostRankError

LOOKS_A_SECOND = 50


def common_store(timeout: datetime.timedelta) -> tuple[dist.Store, int, int]:
    """The store of this attempt, this rank, and how many there are.

    Raises:
        LostRankError: not all ranks have come within `timeout`; on rank 0.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore("megakd", store)
    attempt = welcome_all(store, size, timeout) if rank == 0 else be_welcomed(store, rank)
    return dist.PrefixStore(attempt, store), rank, size


def welcome_all(store: dist.Store, size: int, timeout: datetime.timedelta) -> str:
    """Rank 0's part."""
    attempt, missing, end = uuid.uuid4().hex, set(range(1, size)), time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in sorted(missing):
            if store.check([f"hello/{rank}"]):
                store.set(f"welcome/{store.get(f'hello/{rank}').decode()}", attempt)
            if store.check([f"thanks/{attempt}/{rank}"]):
                missing.discard(rank)
        if time.monotonic() > end:
            missed = f"of {size} ranks {sorted(missing)} have not come within {timeout} (--timeout-minutes)"
            raise LostRankError(f"{missed}; look for their own lines")
        time.sleep(1 / LOOKS_A_SECOND)
    return attempt


def be_welcomed(store: dist.Store, rank: int) -> str:
    """Any other rank's part; waits as long as the store does."""
    token = uuid.uuid4().hex
    store.set(f"hello/{rank}", token)
    attempt = store.get(f"welcome/{token}").decode()
    store.set(f"thanks/{attempt}/{rank}", "1")
    return attempt
