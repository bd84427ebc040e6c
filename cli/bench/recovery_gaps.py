"""What a router's history says of the time between the tokens of its streams."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from elasticmoe.cli.bench.history import events


class Gaps(msgspec.Struct, frozen=True):
    """The longest gaps in seconds, -1 for none, and the number of streams on the rank; of all where none is named."""

    of_rank: float
    of_others: float
    num_streams: int


def gaps_around(lines: Iterable[bytes], rank: str, killed: float, back: float, until: float) -> Gaps:
    """From a router's history: the longest gaps that lasted at some moment between `killed` and `back`, of the streams
    that had begun on `rank` by the time `killed`, and of those on other ranks. A stream that did not go on before
    `until` counts up to then, or to its end without another token."""
    rank_of: dict[str, str] = {}
    last: dict[str, float] = {}
    there: dict[str, str] = {}  # streams with a token at the kill -> their rank then
    longest: dict[str, float] = {}
    is_after = False
    for event in events(lines):
        if event.t > until:
            break
        if event.t > killed and not is_after:
            is_after = True
            there = {name: rank_of[name] for name in last}
        if event.event == "chunk":
            is_watched = event.id in there and event.id in last
            if is_watched and last[event.id] <= back:
                longest[event.id] = max(longest.get(event.id, 0.0), event.t - last[event.id])
            if is_watched or not is_after:
                last[event.id] = event.t
        elif event.event == "terminal":
            if event.id in there and event.id in last and last[event.id] <= back:
                longest[event.id] = max(longest.get(event.id, 0.0), event.t - last[event.id])
            last.pop(event.id, None)
        elif event.rank:
            rank_of[event.id] = event.rank
    if not is_after:  # nothing has come since
        there = {name: rank_of[name] for name in last}
    for name in there:
        if name in last and last[name] <= back:  # it did not go on
            longest[name] = max(longest.get(name, 0.0), until - last[name])
    gaps = {name: longest[name] for name in there}
    own = [gaps[name] for name, place in there.items() if place == rank]
    others = [gaps[name] for name, place in there.items() if place != rank]
    return Gaps(max(own, default=-1.0), max(others, default=-1.0), len(own) if rank else len(there))


def gaps_within(lines: Iterable[bytes], begin: float, end: float, *, with_open: bool = False) -> list[float]:
    """The times between two chunks of one stream, in seconds, ascending; those that ended between `begin` and `end`.
    `with_open`: also those of streams that had neither gone on nor ended by then, up to `end`, and from the last chunk
    to an end without another."""
    last: dict[str, float] = {}
    found: list[float] = []
    for event in events(lines):
        if with_open and event.t > end:
            break
        at = last.pop(event.id, None) if event.event == "terminal" else last.get(event.id)
        is_over = event.event == "chunk" or (with_open and event.event == "terminal")
        if is_over and at is not None and begin <= event.t <= end:
            found.append(event.t - at)
        if event.event == "chunk":
            last[event.id] = event.t
    if with_open:
        found += [end - at for at in last.values()]
    return sorted(found)
