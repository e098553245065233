"""A template is foreign code: it gets so many seconds and so much memory, and then it is ended.

Jinja's sandbox keeps it from files and from Python; that it ends, and what it builds on the way, is bounded here.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ImportError:  # not on Windows
    resource = None

from megakd.data.values import MOST_TEXT

SECONDS = 10
MEMORY = 2**30  # bytes
PAGES = Path("/proc/self/statm")


def bounded(write: Callable[[], str]) -> str:
    """What `write()` returns.

    Raises:
        TimeoutError, MemoryError, ValueError: it takes more than SECONDS, MEMORY, or MOST_TEXT characters.
    """
    with limited_seconds(SECONDS), limited_memory(MEMORY):
        text = write()
    if len(text) > MOST_TEXT:
        raise ValueError(f"it writes {len(text):,} characters, and a text has at most {MOST_TEXT:,}")
    return text


@contextmanager
def limited_seconds(seconds: float) -> Iterator[None]:
    """A clock rings in the block; none does in another thread than the first, where signals are not heard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: object) -> None:
        raise TimeoutError(f"it takes more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def limited_memory(more: int) -> Iterator[None]:
    """Of this process, where the system counts it: `more` bytes than it has now."""
    if resource is None or not PAGES.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(PAGES.read_text().split()[0]) * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {more / 2**30:.0f} GiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
