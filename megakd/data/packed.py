"""Many short byte strings in little memory: one after the other, in blocks that are never moved.

As objects of Python's a row of a hundred token ids takes several kilobytes. In one growing piece of memory it would take its 400
bytes, but the piece is copied as it grows, and what it leaves behind is lost to the process.
"""

from array import array
from bisect import bisect_right
from collections.abc import Sequence

BLOCK = 2**20  # bytes


class Packed(Sequence[bytes]):
    """A list of byte strings that can only grow at its end."""

    def __init__(self) -> None:
        self._blocks = [bytearray()]
        self._first = [0]  # of each block, the number of its first string
        self._ends = array("q")  # of each string, in its block

    def append(self, string: bytes) -> None:
        """One more; what is longer than a block stands alone."""
        if self._blocks[-1] and len(self._blocks[-1]) + len(string) > BLOCK:
            self._blocks.append(bytearray())
            self._first.append(len(self))
        self._blocks[-1] += string
        self._ends.append(len(self._blocks[-1]))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        index = range(len(self))[index]
        block = bisect_right(self._first, index) - 1
        begin = self._ends[index - 1] if index > self._first[block] else 0
        return bytes(self._blocks[block][begin : self._ends[index]])
