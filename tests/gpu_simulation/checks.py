"""What must hold of simulated ranks; each gives the first thing that does not, or nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from megakd.simulation.record import Message, Record


def refusals(record: Record) -> list[str]:
    """What a GPU would refuse, and what it would do slowly."""
    return [*([record.failure] if record.failure else []), *record.complaints]


def disagreement(records: Sequence[Record]) -> str | None:
    """Ranks that would wait for each other for ever: of every group all ask for the same collectives in the same order, and between
    every two as much is sent as is received."""
    asked: dict[tuple[int, ...], dict[int, list]] = defaultdict(dict)
    between: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, record in enumerate(records):
        for message in record.messages:
            if message.peer is not None:
                other = message.ranks[message.peer]
                pair = (rank, other) if message.operation == "send" else (other, rank)
                between[pair][message.operation].append(message.bytes)
            elif len(message.ranks) > 1:
                asked[message.ranks].setdefault(rank, []).append(said(message))
    for pair, halves in between.items():
        if halves["send"] != halves["recv_"]:
            return f"{pair[0]} sends {halves['send'][:8]}, {pair[1]} receives {halves['recv_'][:8]} bytes"
    for ranks, by_rank in asked.items():
        first = by_rank.get(ranks[0], [])
        for rank in ranks:
            if by_rank.get(rank, []) != first:
                return f"group {ranks}: rank {ranks[0]} and rank {rank} differ at {first_difference(first, by_rank.get(rank, []))}"
    return None


def said(message: Message) -> tuple:
    """What both sides must agree in; pickled objects have sizes of their own."""
    return message.part, message.operation, None if message.by_host else message.bytes


def first_difference(one: list, other: list) -> str:
    """Where two orders part."""
    at = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return f"call {at}: {one[at : at + 2]} and {other[at : at + 2]}"


def waits(record: Record) -> dict[str, int]:
    """How often the host waits for the device in the recorded iteration, by line; the stopwatch's own waiting, and what is done
    behind the iteration, left out."""
    left_out = ("evaluate", "save", "load")
    counted: dict[str, int] = defaultdict(int)
    for (part, what, line), count in record.waits.items():
        if what != "synchronize" and part not in left_out:
            counted[f"{part}: {what} at {line.split(' < ')[0]}"] += count
    return dict(counted)
