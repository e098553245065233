"""Live bytes of the device's tensors, by the part of the run that made them: what an allocator that loses nothing would hold."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict

from torch import Tensor

from megakd.simulation.record import Record

ROUNDED = 512  # bytes: torch's allocator gives no less


class Memory:
    """A storage is counted from its first tensor until it is freed. Peaks and what was alive then go into the record."""

    def __init__(self, record: Record):
        self.record = record
        self.live, self.by_maker = 0, Counter()
        self.storages: dict[int, tuple[int, str]] = {}
        self.peaks: dict[str, int] = defaultdict(int)

    def watch(self, tensor: Tensor) -> None:
        """Count it, if its storage is not counted yet."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.storages:
            return
        size, part = -(-storage.nbytes() // ROUNDED) * ROUNDED, self.record.part
        self.storages[storage._cdata] = size, part
        self.live += size
        self.by_maker[part] += size
        weakref.finalize(storage, self._freed, storage._cdata)
        self.look()

    def look(self) -> None:
        """Whether the part in hand has never held more."""
        part = self.record.part
        if self.live > self.peaks[part]:
            self.peaks[part] = self.record.peaks[part] = self.live
            self.record.alive[part] = dict(self.by_maker)

    def begin(self) -> None:
        """Forget the peaks so far: a new iteration."""
        for peaks in (self.peaks, self.record.peaks, self.record.alive):
            peaks.clear()

    def _freed(self, key: int) -> None:
        size, part = self.storages.pop(key)
        self.live -= size
        self.by_maker[part] -= size
