"""When a rank that joined served its first token: read from the router's history."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from elasticmoe.cli.bench.history import events


def first_token(lines: Iterable[bytes], ranks: Collection[str], since: float, until: float) -> float | None:
    """The monotonic time of the first token that a request got while one of `ranks` worked on it; None for none.

    A request is on the rank that it was given to when it was accepted, or that it has moved to since. A rank's first
    tokens for a request that moved may reach the router just before the news of the move: the time is an upper bound by
    those milliseconds. Only tokens between `since` and `until` count.
    """
    rank_of: dict[str, str] = {}
    for event in events(lines):
        if event.t > until:
            return None
        if event.event == "chunk":
            if event.t >= since and rank_of.get(event.id) in ranks:
                return event.t
        elif event.event == "terminal":
            rank_of.pop(event.id, None)
        elif event.rank:
            rank_of[event.id] = event.rank
    return None
