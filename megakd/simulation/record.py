"""What was seen of a rank, as plain numbers and words: JSON."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Work:
    """What one part of an iteration asks of the device and of the host."""

    launches: int = 0
    flops: float = 0
    bytes: float = 0
    messages: int = 0
    message_bytes: float = 0
    device_s: float = 0  # by roofline
    message_s: float = 0
    host_s: float = 0  # launches alone

    def __iadd__(self, other: Work) -> Work:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass(frozen=True)
class Message:
    """A collective, or one half of a send, as its rank asks for it."""

    part: str
    operation: str
    ranks: tuple[int, ...]  # of its group, numbered in the job
    peer: int | None  # of a send or a receive, numbered in the group
    bytes: int
    by_host: bool = False  # of objects, or over gloo


@dataclass
class Record:
    """Of one iteration, unless it says otherwise. Parts are the stopwatch's: rollout, teacher, prompt_step, student_step, optimizer ..."""

    part: str = "set-up"
    parts: dict[str, Work] = field(default_factory=lambda: defaultdict(Work))
    waits: Counter = field(default_factory=Counter)  # (part, what, line): how often the host waits for the device
    copies: Counter = field(default_factory=Counter)  # (part, line): from the host to the device
    complaints: Counter = field(default_factory=Counter)  # what a GPU would refuse, in words
    messages: list[Message] = field(default_factory=list)
    captures: int = 0
    peaks: dict[str, int] = field(default_factory=dict)  # bytes, by part
    alive: dict[str, dict[str, int]] = field(default_factory=dict)  # at each part's peak: bytes by the part that made them
    resident: dict[str, int] = field(default_factory=dict)  # between iterations: bytes by the part that made them
    told: list = field(default_factory=list)  # objects that the last stage tells the others, in all iterations
    logged: dict[str, float] = field(default_factory=dict)
    seconds: float = 0  # that the simulation of an iteration took
    failure: str = ""  # the traceback of what ended it

    def begin(self) -> None:
        """Forget what was counted so far: a new iteration. Complaints stay, and what was needed to build."""
        for counted in (self.parts, self.waits, self.copies, self.messages):
            counted.clear()
        self.captures = 0

    def write(self, path: Path) -> None:
        """As JSON."""
        lists = {name: [[*key, count] for key, count in getattr(self, name).items()] for name in ("waits", "copies")}
        parts = {name: asdict(work) for name, work in self.parts.items()}
        messages = [asdict(message) for message in self.messages]
        path.write_text(json.dumps({**vars(self), **lists, "parts": parts, "messages": messages}))

    @classmethod
    def read(cls, path: Path) -> Record:
        """What `write` wrote."""
        told = json.loads(path.read_text())
        told |= {name: Counter({tuple(key): count for *key, count in told[name]}) for name in ("waits", "copies")}
        told["parts"] = {name: Work(**work) for name, work in told["parts"].items()}
        told["messages"] = [Message(**message | {"ranks": tuple(message["ranks"])}) for message in told["messages"]]
        return cls(**told)
